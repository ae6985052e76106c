"""The fused backend: one launch per projection runs all experts of a layer, whatever their widths."""
