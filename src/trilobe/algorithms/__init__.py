"""Lobe 2, algorithms: training from beliefs, calibration, export. Arrays and torch modules in, arrays out."""
