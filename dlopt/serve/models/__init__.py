"""What is served: names, versions and labels, each a model that runs the rows of many requests together."""
