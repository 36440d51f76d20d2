"""What crosses between the halves. Imports numpy alone."""
