"""Record what the packages that define quantised formats make of small weights: tests/recorded/*.safetensors.

Each file holds the tensors of one weight as the package stores them, `expected`, which is the package's own dense
weight, and in its metadata the quantization_config and the package's version. Tests need none of the packages.

pip install compressed-tensors==0.20.1 auto-round==0.16.1 mlx==0.32.4 mlx-cpu==0.32.4 hqq==0.2.8.post1 \\
    nvidia-modelopt==0.47.0 torchao==0.18.0 triton==3.5.1
pip download --no-deps --no-binary :all: autoawq==0.2.9
pip download --no-deps mslk-cuda==1.1.0 && unzip -d mslk mslk_cuda-1.1.0-*.whl
python scripts/record_formats.py --awq autoawq-0.2.9/awq/utils/packing_utils.py --mslk mslk
pip install compressed-tensors==0.12.2
python scripts/record_formats.py --only ordered
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

OUT = Path(__file__).parent.parent / "tests" / "recorded"
O, I, GROUP = 64, 96, 32
Case = tuple[str, str, dict[str, Any], dict[str, torch.Tensor], torch.Tensor]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """The same weights every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compressed_tensors() -> Iterator[Case]:
    """Weights that its compressors write and read again."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    made_by = f"compressed-tensors {version('compressed-tensors')}"
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "ct_int4_group": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}),
        "ct_int4_zeros": (
            "pack-quantized",
            {"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": False},
        ),
        "ct_int3_zeros": ("pack-quantized", {"num_bits": 3, "strategy": "channel", "symmetric": False}),
        "ct_int8_rows": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        "ct_int8_bytes": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        "ct_int8_bytes_zeros": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
        "ct_fp8_rows": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        "ct_fp8_tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        "ct_fp8_blocks": (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [48, 40]},
        ),
        "ct_nvfp4": (
            "nvfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        ),
    }
    weight = noise(O, I).bfloat16()
    for name, (form, settings) in kinds.items():
        args = QuantizationArgs(**settings)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
        blocks = weight
        if settings["strategy"] == "block":
            height, width = settings["block_structure"]
            padded = torch.nn.functional.pad(weight, (0, -I % width, 0, -O % height))
            blocks = padded.unflatten(0, (-1, height)).unflatten(2, (-1, width)).transpose(1, 2).flatten(2)
        elif "group_size" in settings:
            blocks = weight.unflatten(1, (-1, settings["group_size"]))
        elif settings["strategy"] == "tensor":
            blocks = weight.flatten()
        low, high = blocks.amin(-1), blocks.amax(-1)
        whole = generate_gparam(weight.amin(), weight.amax()) if form.startswith("nvfp4") else None
        scale, zero = calculate_qparams(low, high, args, global_scale=whole)
        if settings["strategy"] in ("channel", "tensor"):
            scale, zero = scale.reshape(-1, 1), zero.reshape(-1, 1)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        if whole is not None:
            state["weight_global_scale"] = whole
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress(dict(state), scheme)
        dense = compressor.decompress(dict(stored), scheme)["weight"]
        tensors = {f"x.{key}": tensor for key, tensor in stored.items() if tensor is not None}
        group = {"format": form, "targets": ["Linear"], "weights": json.loads(args.model_dump_json())}
        config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
        yield name, made_by, config, tensors, dense


def ordered() -> Iterator[Case]:
    """Weights whose groups are in an order of their own, as compressed-tensors wrote them until version 0.12."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    made_by = f"compressed-tensors {version('compressed-tensors')}"
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "ct_int4_order": ("pack-quantized", {"num_bits": 4}),
        "ct_int8_bytes_order": ("int-quantized", {"num_bits": 8, "symmetric": False}),
        "ct_fp8_order": ("float-quantized", {"num_bits": 8, "type": "float"}),
    }
    weight = noise(O, I).bfloat16()
    order = torch.randperm(I, generator=torch.Generator().manual_seed(1)).int() // GROUP
    for name, (form, settings) in kinds.items():
        args = QuantizationArgs(**settings, strategy="group", group_size=GROUP, actorder="group")
        groups = weight[:, torch.argsort(order, stable=True)].unflatten(1, (-1, GROUP))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        compressor = BaseCompressor.load_from_registry(form)
        stored = compressor.compress_weight(
            weight=weight, scale=scale, zero_point=zero, g_idx=order, quantization_args=args
        )
        stored |= {"weight_scale": scale, "weight_zero_point": zero, "weight_g_idx": order} | stored
        if args.symmetric:
            del stored["weight_zero_point"]
        dense = compressor.decompress_weight(stored, args)
        group = {"format": form, "targets": ["Linear"], "weights": json.loads(args.model_dump_json())}
        config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
        yield name, made_by, config, {f"x.{key}": tensor for key, tensor in stored.items()}, dense


def gptq() -> Iterator[Case]:
    """Weights that AutoRound packs for GPTQ, and what its plain torch kernel multiplies with: x W for x = 1."""
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    made_by = f"auto-round {version('auto-round')}"
    for bits in (2, 3, 4, 8):
        for kind, module, form in (("v1", qlinear_torch_zp, "gptq"), ("v2", qlinear_torch, "gptq_v2")):
            linear = torch.nn.Linear(I, O, bias=False)
            linear.weight.data = noise(O, I, seed=bits)
            groups = linear.weight.data.unflatten(1, (-1, GROUP))
            scales = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
            zeros = (-groups.amin(-1) / scales).round().clamp(1, 2**bits - 1)
            ordered = bits == 4
            layer = module.QuantLinear(bits, GROUP, I, O, bias=False, g_idx=ordered)
            layer.device = torch.device("cpu")  # auto-round 0.16.1 asks its second version for it
            layer.pack(linear, scales, zeros, device="cpu")
            if ordered:
                mixed = torch.randperm(I, generator=torch.Generator().manual_seed(1))
                layer.g_idx = layer.g_idx[mixed]
            dense = layer(torch.eye(I, dtype=torch.float16)).t()
            tensors = {f"x.{key}": getattr(layer, key) for key in ("qweight", "qzeros", "scales")}
            if ordered:
                tensors["x.g_idx"] = layer.g_idx
            config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": form}
            yield f"gptq_{kind}_{bits}bit", made_by, config | {"desc_act": ordered}, tensors, dense


def awq(packing_utils: Path) -> Iterator[Case]:
    """Any words, and what AutoAWQ's own unpacking makes of them."""
    spec = spec_from_file_location("packing_utils", packing_utils)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    chance = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (I + I // GROUP, O // 8), generator=chance).int()
    qweight, qzeros = words[:I], words[I:]
    scales = noise(I // GROUP, O).half()
    dense = module.dequantize_gemm(qweight, qzeros, scales, 4, GROUP).t()
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    yield "awq", "autoawq 0.2.9", config, {"x.qweight": qweight, "x.qzeros": qzeros, "x.scales": scales}, dense


def modelopt() -> Iterator[Case]:
    """NVFP4 as its export writes it."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    made, scale, whole = NVFP4QTensor.quantize(noise(O, I).bfloat16(), 16)
    dense = made.dequantize(dtype=torch.bfloat16, scale=scale, double_scale=whole, block_sizes={-1: 16})
    tensors = {"x.weight": made._quantized_data, "x.weight_scale": scale, "x.weight_scale_2": whole}
    tensors["x.input_scale"] = torch.tensor(0.25)
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    yield "modelopt_nvfp4", f"nvidia-modelopt {version('nvidia-modelopt')}", config, tensors, dense


def torchao() -> Iterator[Case]:
    """Linears that its configs make, as its own safetensors support writes them."""
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup, PerRow
    from torchao.quantization.quant_primitives import MappingType

    made_by = f"torchao {version('torchao')}"
    kinds = {
        "torchao_int8_rows": Int8WeightOnlyConfig(granularity=PerRow()),
        "torchao_int8_groups": Int8WeightOnlyConfig(granularity=PerGroup(GROUP)),
        "torchao_intx4_groups": IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]  # torch declares it at run time
            granularity=PerGroup(GROUP),
            mapping_type=MappingType.ASYMMETRIC,
        ),
        "torchao_intx3_rows": IntxWeightOnlyConfig(
            weight_dtype=torch.int3,  # type: ignore[attr-defined]  # as int4
            granularity=PerAxis(0),
        ),
        "torchao_fp8_rows": Float8WeightOnlyConfig(),
        "torchao_nvfp4": NVFP4WeightOnlyConfig(),
        "torchao_nvfp4_no_factor": NVFP4WeightOnlyConfig(use_dynamic_per_tensor_scale=False),
    }
    for name, config in kinds.items():
        linear = torch.nn.Linear(I, O, bias=False, dtype=torch.bfloat16)
        linear.weight.data = noise(O, I).bfloat16()
        quantize_(linear, config)
        tensors, _ = flatten_tensor_state_dict({"x.weight": linear.weight.data})
        about = {"quant_method": "torchao", "quant_type": {"default": {"_type": type(config).__name__}}}
        yield name, made_by, about, tensors, linear.weight.dequantize()
    floats = {
        "mxfp8": torch.float8_e4m3fn,
        "mxfp8_e5m2": torch.float8_e5m2,
        "mxfp4": torch.float4_e2m1fn_x2,
    }
    for kind, codes in floats.items():
        for order in ("rows", "tiles"):
            weight = MXTensor.to_mx(noise(3 * O, I).bfloat16(), codes, GROUP, is_swizzled_scales=order == "tiles")
            tensors, _ = flatten_tensor_state_dict({"x.weight": weight})
            about = {
                "quant_method": "torchao",
                "quant_type": {"default": {"_type": "MXDynamicActivationMXWeightConfig"}},
            }
            yield f"torchao_{kind}_{order}", made_by, about, tensors, weight.dequantize(torch.bfloat16)


def torchao_int4(mslk: Path) -> Iterator[Case]:
    """Linears in Int4Tensor, made by the plain functions of mslk, whose compiled library needs a GPU.

    torchao dequantises none; what it has are the fake quantiser that trains for these kernels, in float32, and the
    arithmetic of tinygemm, which means the same by codes, scales and what is added.
    """
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Float8DynamicActivationInt4WeightConfig, Int4WeightOnlyConfig, quantize_
    from torchao.quantization.qat.fake_quantize_config import Int4WeightFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import Int4WeightFakeQuantizer
    from torchao.quantization.quant_primitives import _dequantize_affine_tinygemm
    from torchao.quantization.quantize_.workflows.int4 import int4_tensor

    package = module_from_spec(ModuleSpec("mslk", None, is_package=True))  # its __init__ loads the library
    package.__path__ = [str(mslk / "mslk")]
    sys.modules["mslk"] = package
    shuffle = import_module("mslk.quantize.shuffle")
    for function in ("int4_row_quantize", "int4_row_quantize_zp", "pack_int4"):
        setattr(int4_tensor, function, getattr(shuffle, function))

    made_by = f"torchao {version('torchao')}, mslk-cuda 1.1.0"
    outputs, inputs = 16, 256
    settings = Int4WeightFakeQuantizeConfig(group_size=GROUP, activation_dtype=torch.bfloat16)
    in_floats = Int4WeightFakeQuantizer(settings)
    factors = noise(inputs, seed=1).abs().add(0.5).bfloat16()
    kinds = {
        "float32": (Int4WeightOnlyConfig(group_size=GROUP), torch.float32, None),
        "groups": (Int4WeightOnlyConfig(group_size=GROUP), torch.bfloat16, None),
        "awq": (Int4WeightOnlyConfig(group_size=128), torch.bfloat16, factors),
        "no_bias": (Float8DynamicActivationInt4WeightConfig("plain"), torch.bfloat16, None),
    }
    for name, (config, dtype, scaled) in kinds.items():
        linear = torch.nn.Linear(inputs, outputs, bias=False, dtype=dtype)
        linear.weight.data = noise(outputs, inputs).to(dtype)
        dense = in_floats(linear.weight.data)
        quantize_(linear, config)
        weight: Any = linear.weight.data
        weight.act_pre_scale = scaled
        if dtype != torch.float32:
            halves = torch.stack([weight.qdata << 4 >> 4, weight.qdata >> 4], -1).flatten(1)
            dense = _dequantize_affine_tinygemm(
                halves.int() + 8, weight.block_size, weight.scale.t().contiguous(), weight.zero_point.t().contiguous(),
                torch.int32, 0, 15,
            )  # fmt: skip
            dense = (dense if scaled is None else dense * scaled).to(dtype)
        tensors, _ = flatten_tensor_state_dict({"x.weight": weight})
        about = {"quant_method": "torchao", "quant_type": {"default": {"_type": type(config).__name__}}}
        yield f"torchao_int4_{name}", made_by, about, tensors, dense


def mlx() -> Iterator[Case]:
    """Weights that mlx packs."""
    import mlx.core as mx
    import numpy as np

    weight = noise(O, I).half()
    for bits in (2, 3, 4, 5, 6, 8):
        parts = mx.quantize(mx.array(weight.numpy()), group_size=GROUP, bits=bits)
        dense = torch.from_numpy(np.array(mx.dequantize(*parts, group_size=GROUP, bits=bits)))
        words, scales, biases = (torch.from_numpy(np.array(part)) for part in parts)
        config = {"quant_method": "MLX", "group_size": GROUP, "bits": bits}
        tensors = {"x.weight": words, "x.scales": scales, "x.biases": biases}
        yield f"mlx_{bits}bit", f"mlx {version('mlx')}", config, tensors, dense


def hqq() -> Iterator[Case]:
    """Linears that hqq quantises, as transformers saved them."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    kinds: dict[str, dict[str, Any]] = {
        "hqq_1bit_inputs": {"nbits": 1, "axis": 1},
        "hqq_2bit_outputs": {"nbits": 2, "axis": 0, "group_size": 16},
        "hqq_3bit_inputs": {"nbits": 3, "axis": 1},
        "hqq_3bit_outputs": {"nbits": 3, "axis": 0},
        "hqq_4bit_inputs": {"nbits": 4, "axis": 1},
        "hqq_4bit_floats": {"nbits": 4, "axis": 0, "view_as_float": True},
        "hqq_8bit_inputs": {"nbits": 8, "axis": 1},
    }
    for name, settings in kinds.items():
        linear = torch.nn.Linear(I, O, bias=False)
        linear.weight.data = noise(O, I)
        asked = BaseQuantizeConfig(**{"group_size": GROUP, **settings})
        quantised = HQQLinear(linear, asked, compute_dtype=torch.float32, device="cpu")
        tensors = {f"x.{key}": tensor for key, tensor in quantised.state_dict().items()}
        yield name, f"hqq {version('hqq')}", {"quant_method": "hqq"}, tensors, quantised.dequantize()


def main() -> None:
    """Record everything, or what is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--awq", type=Path, help="packing_utils.py of AutoAWQ's source")
    parser.add_argument("--mslk", type=Path, help="the wheel of mslk-cuda, unpacked")
    parser.add_argument(
        "--only",
        help="one of compressed_tensors, ordered, gptq, awq, modelopt, mlx, torchao, torchao_int4, hqq",
    )
    asked = parser.parse_args()
    sources = {
        "compressed_tensors": compressed_tensors,
        "gptq": gptq,
        "modelopt": modelopt,
        "mlx": mlx,
        "torchao": torchao,
        "hqq": hqq,
    }
    if asked.awq:
        sources["awq"] = lambda: awq(asked.awq)
    if asked.mslk:
        sources["torchao_int4"] = lambda: torchao_int4(asked.mslk)
    OUT.mkdir(exist_ok=True)
    for source in [(sources | {"ordered": ordered})[asked.only]] if asked.only else sources.values():
        for name, made_by, config, tensors, expected in source():
            held = {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}
            about = {"config": json.dumps(config), "made_by": made_by}
            save_file(held | {"expected": expected.detach().contiguous().clone()}, OUT / f"{name}.safetensors", about)
            print(name, {key: (str(one.dtype), list(one.shape)) for key, one in held.items()})


if __name__ == "__main__":
    main()
