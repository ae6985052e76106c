"""The fused backend: every expert of a layer, whatever its width, in one launch per projection."""
