"""The network to compress: its layers, its graph, its dense baseline, chains in layers' places."""
