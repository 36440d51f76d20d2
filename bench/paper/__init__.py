"""The experiments of the PagedAttention paper (Kwon et al., SOSP 2023), replayed on this repository's scheduler."""
