"""From a plan to a checkpoint: a task per decoder layer, quantized, packed and written."""
