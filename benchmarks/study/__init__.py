"""What the families learn at equal cost: docs/study.md."""
