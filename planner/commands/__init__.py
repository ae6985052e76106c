"""The commands of ``moeq``: their flags, what they call, and what they print. One file per command."""
