"""What a value is: one text for each, one type for each column, and numbers as they were written."""
