"""LiteRT: conversion, weights into .tflite files, and its compiler for NPUs."""
