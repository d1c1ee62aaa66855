"""What is given: every module of mamba_ssm, causal_conv1d and their extensions, and each name's home here.

A table, and no imports: `mambakit.compat.finder` makes the modules from it, `mambakit env` and the guide print it.
"""

from __future__ import annotations

# mamba_ssm's last release before Mamba-2: transformers then takes Mamba-1's functions and leaves out Mamba-2's.
VERSIONS = {"mamba_ssm": "1.2.2+mambakit", "causal_conv1d": "1.5.2+mambakit"}
# The names under which pip knows them.
DISTRIBUTIONS = {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d"}


def _from(home: str, names: str) -> dict[str, str]:
    """``"theirs=ours"`` or ``"name"``, separated by spaces, as their name -> "module:name"."""
    pairs = (name.partition("=") for name in names.split())
    return {theirs: f"mambakit.compat.{home}:{ours or theirs}" for theirs, _, ours in pairs}


_SCAN = _from("selective_scan", "SelectiveScanFn selective_scan_fn selective_scan_ref")
_INNER = _from(
    "inner",
    "MambaInnerFn mamba_inner_fn mamba_inner_fn_no_out_proj bimamba_inner_fn "
    # Of the ops one by one upstream, as the functions are here.
    "mamba_inner_ref=mamba_inner_fn bimamba_inner_ref=bimamba_inner_fn",
)
_UPDATE = _from("state_update", "selective_state_update selective_state_update_ref")
_NORM_REFERENCES = _from("norm_references", "layer_norm_ref rms_norm_ref")
_CONV = _from("convolution", "causal_conv1d_fn causal_conv1d_update")
_CONV_REFERENCES = _from("convolution", "CausalConv1dFn causal_conv1d_ref causal_conv1d_update_ref")
_VARLEN = _from(
    "convolution", "causal_conv1d_varlen_states causal_conv1d_varlen_states_ref=causal_conv1d_varlen_states"
)
_MIXER = _from("mamba", "Mamba")
_MODEL = _from("mixer_model", "MambaLMHeadModel MixerModel create_block _init_weights=init_weights CausalLMOutput")
_CONFIG = _from("mixer_model", "MambaConfig")
_SAMPLING = _from(
    "sampling",
    "sample modify_logits_for_min_p_filtering modify_logits_for_top_k_filtering modify_logits_for_top_p_filtering "
    "modify_logit_for_repetition_penalty",
)

# Module -> the names that it has.
MODULES: dict[str, dict[str, str]] = {
    "mamba_ssm": _from("selective_scan", "selective_scan_fn")
    | _from("inner", "mamba_inner_fn bimamba_inner_fn")
    | _MIXER
    | _from("mixer_model", "MambaLMHeadModel"),
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.mamba_simple": _MIXER
    | _from("early_block", "Block")
    | _SCAN
    | _INNER
    | _from("state_update", "selective_state_update")
    | _from("norm", "RMSNorm layer_norm_fn rms_norm_fn")
    | _CONV,
    "mamba_ssm.modules.block": _from("block", "Block") | _from("norm", "RMSNorm layer_norm_fn"),
    "mamba_ssm.modules.mlp": _from("mlp", "GatedMLP"),
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": _SCAN | _INNER | _CONV,
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.selective_state_update": _UPDATE,
    "mamba_ssm.ops.triton.layer_norm": _NORM_REFERENCES
    | _from(
        "norm",
        "RMSNorm LayerNormFn layer_norm_fn rms_norm_fn layer_norm_linear_fn _layer_norm_fwd=normalized_rows",
    ),
    "mamba_ssm.ops.triton.layernorm": _NORM_REFERENCES
    | _from(
        "norm",
        "RMSNorm layer_norm_fn=old_layer_norm_fn rms_norm_fn=old_rms_norm_fn layer_norm_linear_fn "
        "_layer_norm_fwd=normalized_rows",
    ),
    "mamba_ssm.models": {},
    "mamba_ssm.models.mixer_seq_simple": _MODEL
    | _CONFIG
    | _MIXER
    | _from("block", "Block")
    | _from("mlp", "GatedMLP")
    | _from("norm", "RMSNorm layer_norm_fn rms_norm_fn")
    | _from("generation", "GenerationMixin")
    | _from("hub", "load_config_hf load_state_dict_hf"),
    "mamba_ssm.models.config_mamba": _CONFIG,
    "mamba_ssm.utils": {},
    "mamba_ssm.utils.generation": _SAMPLING
    | _from("generation", "GenerationMixin InferenceParams GenerateDecoderOnlyOutput decode"),
    "mamba_ssm.utils.hf": _from("hub", "load_config_hf load_state_dict_hf"),
    "mamba_ssm.utils.torch": _from("precision", "custom_fwd custom_bwd"),
    "causal_conv1d": _CONV,
    "causal_conv1d.causal_conv1d_interface": _CONV | _CONV_REFERENCES,
    "causal_conv1d.causal_conv1d_varlen": _VARLEN,
    "causal_conv1d.cpp_functions": _from(
        "convolution_extension",
        "causal_conv1d_fwd_function=conv_fwd_function causal_conv1d_bwd_function=conv_bwd_function "
        "causal_conv1d_update_function=conv_update_function",
    ),
    "selective_scan_cuda": _from("scan_extensions", "fwd=scan_fwd bwd=scan_bwd"),
    "selective_scan_cuda_oflex": _from("scan_extensions", "fwd=oflex_fwd bwd=oflex_bwd"),
    "selective_scan_cuda_core": _from("scan_extensions", "fwd=core_fwd bwd=oflex_bwd"),
    "causal_conv1d_cuda": _from(
        "convolution_extension",
        "causal_conv1d_fwd=conv_fwd causal_conv1d_bwd=conv_bwd causal_conv1d_update=conv_update",
    ),
}

EXTENSIONS = ("selective_scan_cuda", "causal_conv1d_cuda", "selective_scan_cuda_oflex", "selective_scan_cuda_core")
# Module -> the extensions that it binds as names of its own, as theirs do: code asks them whether they are None.
BOUND = {
    "mamba_ssm.ops.selective_scan_interface": ("selective_scan_cuda", "causal_conv1d_cuda"),
    "causal_conv1d.causal_conv1d_interface": ("causal_conv1d_cuda",),
    "causal_conv1d.cpp_functions": ("causal_conv1d_cuda",),
}
# Written in Triton: where there is no CUDA device they are replaced, though they may be installed.
TRITON = tuple(f"mamba_ssm.ops.triton.{name}" for name in ("layer_norm", "layernorm", "selective_state_update"))

# Modules whose one name can be imported, and raises when it is made: copies of upstream's model file import them all.
UNUSABLE = {
    "mamba_ssm.modules.mamba2": _from("absent", "Mamba2"),
    "mamba_ssm.modules.mamba3": _from("absent", "Mamba3"),
    "mamba_ssm.modules.mha": _from("absent", "MHA"),
}
_SSD = "ssd_bmm ssd_chunk_scan ssd_chunk_state ssd_combined ssd_state_passing layernorm_gated k_activations mamba3"
# What cannot even be imported, though mamba_ssm has it -> what it is.
ABSENT: dict[str, str] = {
    **dict.fromkeys(
        ["mamba_ssm.Mamba2", "mamba_ssm.modules.mamba2_simple", "mamba_ssm.modules.ssd_minimal",
         "mamba_ssm.distributed"],
        "Mamba-2",
    ),
    **dict.fromkeys(["mamba_ssm.Mamba3", "mamba_ssm.ops.cute", "mamba_ssm.ops.tilelang"], "Mamba-3"),
    **dict.fromkeys([f"mamba_ssm.ops.triton.{name}" for name in _SSD.split()], "Mamba-2 and 3"),
}  # fmt: skip


def absent_message(name: str, kind: str) -> str:
    return (
        f"{name} is {kind}, which mambakit does not have; it gives the Mamba-1 part of mamba_ssm. Install mamba-ssm "
        "for it, or leave that model out"
    )


def is_package(module: str) -> bool:
    return any(name.startswith(f"{module}.") for name in MODULES)
