"""From sources to archives: conversion, encoding, statistics."""
