"""What every room uses: progress, memory, units."""
