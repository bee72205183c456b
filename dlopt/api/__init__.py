"""What `import dlopt` offers, a module for each of its nouns; the command line calls the same functions."""
