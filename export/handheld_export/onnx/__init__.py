"""ONNX: graphs that hold the codes of students, shared weights and fixed grids."""
