"""Models as graphs for other runtimes: ONNX, and PyTorch's exported programs (pt2).

A graph reads any number of tokens from a state and gives the state after them, as `MambaCache` holds it:
``(input_ids (b, l), conv_states (layers, b, d, k - 1), ssm_states (layers, b, d, n)) -> (logits (b, l, v), both)``.
"""
