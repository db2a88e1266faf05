"""Where weights lie, as integers and names: boxes of HF tensors, strides, parallel axes, headers of safetensors files. Pure."""
