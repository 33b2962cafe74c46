"""Lower a student to ONNX, quantise it, check parity, build engines and write the bundle a device reads."""
