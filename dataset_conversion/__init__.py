"""Dataset converters, one script per data set."""
