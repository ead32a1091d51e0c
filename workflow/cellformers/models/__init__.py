"""Cell foundation models: layers, architectures and their published file layouts."""
