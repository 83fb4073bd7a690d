"""Weights in and out in Hugging Face's format: config.json and *.safetensors, for `checkpoint.init_from` and export.py.

config.py    config.json and tokenizer_config.json <-> our keys
weights.py   tensors <-> *.safetensors, mapped into memory on the way in
"""
