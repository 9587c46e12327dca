"""From a checkpoint's safetensors files to packed experts in host memory."""
