"""Turn a plan into a checkpoint. One task per decoder layer quantizes, packs and writes the layer."""
