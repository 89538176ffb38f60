"""From keys to targets: the index, the search, the neighbours' distribution, its audit."""
