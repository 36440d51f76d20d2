"""The values that cross between the halves. Imports numpy alone."""
