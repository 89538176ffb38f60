"""Hidden states of the frozen base: keys, memory inputs, codecs, their audit."""
