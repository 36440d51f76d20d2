"""Ties the halves together: requests in, text out."""
