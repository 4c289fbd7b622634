"""From a network to what runtimes load: exported programs and ONNX files, and running them."""
