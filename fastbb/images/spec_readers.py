"""Image processor specs from the files of transformers and timm, and back.

`spec_from_config` reads transformers' `preprocessor_config.json` (of any age), `spec_from_timm` a
timm data config, and `config_from_spec` writes the file again. Semantics of the keys: transformers
5 (`image_processing_pil_*.py`) and `timm.data` (`resolve_data_config`, `transforms_imagenet_eval`).
"""

from collections.abc import Mapping
from typing import Any

from .spec import RESAMPLE, ImageProcessorSpec, check_sizes

TIMM_TYPE = "TimmWrapperImageProcessor"
_HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_BASE = {
    "do_resize": True,
    "default_to_square": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}
_BY_EDGE = _BASE | {"default_to_square": False}
# class attributes of transformers' processors, one entry per kind of behaviour
_DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": _BASE | _HALF | {"resample": 2, "size": {"height": 224, "width": 224}},
    "segformer": _BASE | _IMAGENET | {"resample": 2, "size": {"height": 512, "width": 512}},
    "convnext": _BY_EDGE
    | _HALF
    | {"resample": 3, "size": {"shortest_edge": 384}, "crop_pct": 224 / 256},
    "bit": _BY_EDGE
    | _CLIP
    | {"resample": 3, "size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224}
    | {"do_convert_rgb": True},
    "siglip": _BY_EDGE
    | _HALF
    | {"resample": 3, "size": {"height": 224, "width": 224}, "do_convert_rgb": True},
    "beit": _BASE
    | _HALF
    | {"resample": 3, "size": {"height": 224, "width": 224}}
    | {"crop_size": 224},
    "deit": _BASE
    | _HALF
    | {"resample": 3, "size": {"height": 256, "width": 256}}
    | {"do_center_crop": True, "crop_size": 224},
    "pvt": _BASE | _IMAGENET | {"resample": 3, "size": {"height": 224, "width": 224}},
    "dinov3": _BASE | _IMAGENET | {"resample": 2, "size": {"height": 224, "width": 224}},
    "dpt": _BASE
    | _HALF
    | {"resample": 3, "size": {"height": 384, "width": 384}}
    | {"keep_aspect_ratio": False, "ensure_multiple_of": 1},
    "textnet": _BY_EDGE
    | _IMAGENET
    | {"resample": 2, "size": {"shortest_edge": 640}, "size_divisor": 32}
    | {"crop_size": 224, "do_convert_rgb": True},
    "detr": _BASE | _IMAGENET | {"resample": 2},
    "rt_detr": _BY_EDGE
    | _IMAGENET
    | {"resample": 2, "size": {"height": 640, "width": 640}, "do_normalize": False},
    "maskformer": _BASE | _IMAGENET | {"resample": 2, "size_divisor": 32},
}
_KINDS = {
    "ViTImageProcessor": "vit",
    "DeiTImageProcessor": "deit",
    "BeitImageProcessor": "beit",
    "BitImageProcessor": "bit",
    "CLIPImageProcessor": "bit",
    "SiglipImageProcessor": "siglip",
    "DINOv3ViTImageProcessor": "dinov3",
    "PvtImageProcessor": "pvt",
    "DPTImageProcessor": "dpt",
    "TextNetImageProcessor": "textnet",
    "ConvNextImageProcessor": "convnext",
    "SegformerImageProcessor": "segformer",
    "MaskFormerImageProcessor": "maskformer",
    "Mask2FormerImageProcessor": "maskformer",
    "DetrImageProcessor": "detr",
    "ConditionalDetrImageProcessor": "detr",
    "DeformableDetrImageProcessor": "detr",
    "RTDetrImageProcessor": "rt_detr",
}
# kinds that add nothing to transformers' base class, and those that crop
_PLAIN = {"vit", "bit", "siglip", "deit", "pvt"}
_CROPPING = _PLAIN | {"beit", "convnext", "dinov3", "textnet"}
# transformers' table, for the model types that fastbb reads; it lacks the four types marked (*)
_TYPE_OF_MODEL = {
    **dict.fromkeys(("swin", "swinv2", "vit", "dinat"), "ViTImageProcessor"),
    **dict.fromkeys(("dinov2", "bit", "focalnet", "hiera", "pixio"), "BitImageProcessor"),
    "dinov2_with_registers": "BitImageProcessor",  # (*)
    **dict.fromkeys(("clip", "clip_vision_model"), "CLIPImageProcessor"),  # (*) the tower
    **dict.fromkeys(("siglip", "siglip_vision_model"), "SiglipImageProcessor"),  # (*) the tower
    "beit": "BeitImageProcessor",
    "deit": "DeiTImageProcessor",
    **dict.fromkeys(("dinov3_vit", "dinov3_convnext"), "DINOv3ViTImageProcessor"),  # (*) convnext
    **dict.fromkeys(("pvt", "pvt_v2"), "PvtImageProcessor"),
    "textnet": "TextNetImageProcessor",
    **dict.fromkeys(("dpt", "depth_anything"), "DPTImageProcessor"),
    **dict.fromkeys(("resnet", "convnext", "convnextv2"), "ConvNextImageProcessor"),
    **dict.fromkeys(("upernet", "segformer"), "SegformerImageProcessor"),
    "maskformer": "MaskFormerImageProcessor",
    "mask2former": "Mask2FormerImageProcessor",
    "detr": "DetrImageProcessor",
    "conditional_detr": "ConditionalDetrImageProcessor",
    "deformable_detr": "DeformableDetrImageProcessor",
    "rt_detr": "RTDetrImageProcessor",
}
# rules that the libraries have no name for: in a file and as overrides they keep ours
_OWN_KEYS = {"alpha_in_memory", "alpha_in_files", "exif_in_files"}
_HF_KEYS = _OWN_KEYS | {
    *("do_resize", "size", "max_size", "default_to_square", "size_divisor", "resample", "crop_pct"),
    *("do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize", "image_mean"),
    *("image_std", "do_pad", "pad_size", "do_convert_rgb"),
    *("keep_aspect_ratio", "ensure_multiple_of"),
}
_TIMM_KEYS = _OWN_KEYS | {
    *("input_size", "img_size", "interpolation", "mean", "std", "crop_pct", "crop_mode"),
}


def spec_from_config(
    config: Mapping[str, Any], model_type: str | None = None, **overrides: Any
) -> ImageProcessorSpec:
    """Reads the spec of a `preprocessor_config.json`.

    Args:
        config: the file's content; keys that decide no pixel are ignored, as upstream ignores them.
        model_type: of the model's `config.json`; it decides where the file names no processor.
        overrides: keys of the file to replace.

    Raises:
        ValueError: an unsupported type, an override that is no key of it, or a senseless value.
    """
    name = config.get("image_processor_type") or config.get("feature_extractor_type")
    name = name or _TYPE_OF_MODEL.get(model_type or "", "")
    name = name.replace("FeatureExtractor", "ImageProcessor")
    name = name.removesuffix("Fast").removesuffix("Pil")
    if name == TIMM_TYPE:
        own = {key: config[key] for key in _OWN_KEYS & set(config)}
        return spec_from_timm(config["pretrained_cfg"], **{**own, **overrides})
    if name not in _KINDS:
        raise ValueError(
            f"image processor type {name or None!r} is not supported; supported are "
            f"{', '.join(_KINDS)} and timm's data config. For another one build an "
            "ImageProcessorSpec"
        )
    _check_overrides(overrides, _HF_KEYS, name)
    kind = _KINDS[name]
    # an explicit null is kept, as upstream keeps it: do_resize: null resizes nothing
    values = {**_DEFAULTS[kind], **config, **overrides}
    if name == "CLIPImageProcessor" and values.get("use_square_size"):  # KOSMOS-2
        values["size"] = {"height": 224, "width": 224}
    fields: dict[str, Any] = {key: values[key] for key in _OWN_KEYS & set(values)}
    fields["rescale_factor"] = _needed("rescale_factor", values) if values["do_rescale"] else None
    if values["do_normalize"]:
        fields["image_mean"] = _per_channel("image_mean", _needed("image_mean", values))
        fields["image_std"] = _per_channel("image_std", _needed("image_std", values))
    return ImageProcessorSpec(
        reference="hf",
        image_processor_type=name,
        do_convert_rgb=bool(values.get("do_convert_rgb")),
        resize_after_rescale=kind == "dinov3",
        **fields,
        **_resize_and_crop(kind, values),
        **_padding(kind, values),
    )


def _resize_and_crop(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The spec's resize and crop fields, as transformers' classes of that kind read their keys."""
    fields: dict[str, Any] = {}
    if values["do_resize"]:
        fields["resample"] = _filter_name(_needed("resample", values))
        edges = _edges_to_resize_to(kind, values)
        if kind == "maskformer":
            fields["size_divisor"] = _needed("size_divisor", values) or 1
        if kind in ("convnext", "textnet") and "shortest_edge" not in edges:
            raise ValueError(f"this processor's size needs 'shortest_edge', got {edges!r}")
        if kind == "convnext":
            edge = edges["shortest_edge"]
            check_sizes("size", (edge,), 1)
            if edge < 384:
                fields |= {"resize": "shortest_edge", "crop_pct": _needed("crop_pct", values)}
                fields["crop_size"] = (edge, edge)
            else:
                fields |= {"resize": "exact", "size": (edge, edge)}
        elif kind == "dpt":
            fields |= _dpt_resize(_height_width("size", edges), values)
        elif kind == "textnet":
            fields |= {"resize": "shortest_edge", "size": (edges["shortest_edge"],)}
            fields["size_divisor"] = _needed("size_divisor", values)
        else:
            fields["resize"], fields["size"] = _resize_rule(edges)
    if values.get("do_center_crop") and kind in _CROPPING:
        if "crop_size" in fields:
            raise ValueError(
                "ConvNextImageProcessor below 384 crops by itself, and a second crop is not "
                "supported; set do_center_crop to false"
            )
        fields["crop_size"] = _height_width("crop_size", _needed("crop_size", values))
    return fields


def _dpt_resize(size: tuple[int, int], values: Mapping[str, Any]) -> dict[str, Any]:
    """The spec's resize fields of DPT, whose edges are rounded to the nearest multiple."""
    multiple = _needed("ensure_multiple_of", values)
    check_sizes("ensure_multiple_of", (multiple,), 1)
    if values["keep_aspect_ratio"]:
        return {"resize": "closest", "size": size, "size_divisor": multiple}
    if any(2 * (edge % multiple) == multiple for edge in size):  # upstream's depends on the image
        raise ValueError(f"size {size} is half-way between multiples of {multiple}: give another")
    return {"resize": "exact", "size": tuple(round(edge / multiple) * multiple for edge in size)}


def _edges_to_resize_to(kind: str, values: Mapping[str, Any]) -> dict[str, int]:
    """Returns the requested size, with the separate `max_size` of old files."""
    if kind not in ("detr", "maskformer"):
        return _edges("size", _needed("size", values), bool(values["default_to_square"]))
    size, longest = values.get("size"), values.get("max_size", 1333 if kind == "detr" else None)
    if size is None:
        size = 800
        longest = 1333 if kind == "detr" or longest is None else longest
    edges = _edges("size", size, False, longest)
    if set(edges) == {"shortest_edge"}:
        raise ValueError(f"this processor's size needs 'longest_edge' too, got {size!r}")
    return edges


def _padding(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The spec's padding fields, as transformers' classes of that kind read their keys."""
    if kind == "maskformer":
        do_pad = True
    elif kind == "detr":
        do_pad = bool(values.get("do_pad", values.get("pad_and_return_pixel_mask", True)))
    else:
        do_pad = bool(values.get("do_pad")) and (kind in _PLAIN or kind == "rt_detr")
    if kind == "dpt" and values.get("do_pad") and values.get("size_divisor") is not None:
        raise ValueError(
            "DPTImageProcessor pads on all sides to multiples of size_divisor, which is not "
            "supported; set do_pad to false and give a size"
        )
    pad_size = None
    if do_pad and values.get("pad_size") is not None:
        pad_size = _height_width("pad_size", values["pad_size"])
    masked = do_pad and kind in ("detr", "maskformer", "rt_detr")
    return {"do_pad": do_pad, "pad_size": pad_size, "pixel_mask": masked}


def _edges(name: str, value: Any, square: bool, longest: int | None = None) -> dict[str, int]:
    """Converts a size of any age to a dict: {height, width}, {shortest_edge[, longest_edge]}..."""
    if isinstance(value, Mapping):
        return {key: edge for key, edge in value.items() if edge is not None}
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return {"height": value[0], "width": value[1]}
    if type(value) is not int:
        raise ValueError(
            f"{name} must be a whole number, [height, width] or a dict of edges, got {value!r}"
        )
    if square:
        return {"height": value, "width": value}
    return {"shortest_edge": value, **({} if longest is None else {"longest_edge": longest})}


def _height_width(name: str, value: Any) -> tuple[int, int]:
    edges = _edges(name, value, square=True)
    if set(edges) != {"height", "width"}:
        raise ValueError(f"{name} needs 'height' and 'width', got {value!r}")
    return edges["height"], edges["width"]


_EDGES_OF_RULE = {
    "exact": ("height", "width"),
    "shortest_edge": ("shortest_edge",),
    "shortest_longest": ("shortest_edge", "longest_edge"),
    "within": ("max_height", "max_width"),
}


def _resize_rule(edges: dict[str, int]) -> tuple[str, tuple[int, ...]]:
    """Returns the resize rule of a size's keys, and its numbers."""
    for rule, keys in _EDGES_OF_RULE.items():
        if set(edges) == set(keys):
            return rule, tuple(edges[key] for key in keys)
    wanted = "; ".join(" and ".join(keys) for keys in _EDGES_OF_RULE.values())
    raise ValueError(f"a size needs the keys of one of: {wanted}; got {edges!r}")


def _filter_name(value: Any) -> str:
    for name, number in RESAMPLE.items():
        if value == number:
            return name
    raise ValueError(f"resample must be one of Pillow's filters, 0 to 5, got {value!r}")


def _needed(key: str, values: Mapping[str, Any]) -> Any:
    if values.get(key) is None:
        raise ValueError(f"{key} is needed by what this processor does, and is null or missing")
    return values[key]


def _per_channel(name: str, value: Any) -> tuple[float, float, float]:
    if isinstance(value, (int, float)):
        return value, value, value
    if len(value) != 3:
        raise ValueError(f"{name} must be one number or one per channel (3), got {value!r}")
    return tuple(value)


def _check_overrides(overrides: Mapping[str, Any], keys: set[str], name: str) -> None:
    if unknown := sorted(set(overrides) - keys):
        raise ValueError(
            f"{name} has no option {', '.join(map(repr, unknown))}; options are "
            f"{', '.join(sorted(keys))}"
        )


def spec_from_timm(
    pretrained_cfg: Mapping[str, Any], *, use_test_size: bool = False, **overrides: Any
) -> ImageProcessorSpec:
    """Reads the spec of timm's evaluation transform.

    Args:
        pretrained_cfg: timm's dictionary of a pretrained model.
        use_test_size: take the size and crop of timm's test results where they differ, as timm's
            `resolve_data_config` does for this argument.
        overrides: `args` of timm's `resolve_data_config`.

    Raises:
        ValueError: an override that timm does not know, or an input that is not RGB.
    """
    from timm.data.config import resolve_data_config

    _check_overrides(overrides, _TIMM_KEYS | {"use_test_size"}, "timm's data config")
    own = {key: overrides.pop(key) for key in _OWN_KEYS & set(overrides)}
    data = resolve_data_config(overrides, dict(pretrained_cfg), use_test_size=use_test_size)
    channels, height, width = data["input_size"]
    if channels != 3:
        raise ValueError(f"this model takes {channels} channels, and images are processed as RGB")
    mean = _per_channel("mean", data["mean"])
    fields: dict[str, Any] = {"resize": "shortest_edge" if height == width else "cover"}
    if data["crop_mode"] == "squash":
        fields["resize"] = "exact"
    elif data["crop_mode"] == "border":
        fields["resize"] = "contain"
        fields["crop_fill"] = tuple(round(255 * value) for value in mean)
    return ImageProcessorSpec(
        reference="timm",
        image_processor_type=TIMM_TYPE,
        crop_pct=data["crop_pct"],
        resample=data["interpolation"],
        crop_size=(height, width),
        image_mean=mean,
        image_std=_per_channel("std", data["std"]),
        **fields,
        **{"alpha_in_memory": "drop", "exif_in_files": False, **own},
    )


def config_from_spec(spec: ImageProcessorSpec) -> dict[str, Any]:
    """Returns the content of a `preprocessor_config.json` that `spec_from_config` reads as `spec`.

    Raises:
        ValueError: the keys of the spec's `image_processor_type` cannot express it.
    """
    keys = _timm_keys(spec) if spec.image_processor_type == TIMM_TYPE else _hf_keys(spec)
    own = {key: getattr(spec, key) for key in _OWN_KEYS}
    config = {"image_processor_type": spec.image_processor_type, **keys, **own}
    try:
        is_same = spec_from_config(config) == spec
    except ValueError:
        is_same = False
    if not is_same:
        raise ValueError(
            f"{spec.image_processor_type} has no keys for this spec, so a saved configuration "
            "would give other pixels; store spec.to_dict() instead"
        )
    return config


def _hf_keys(spec: ImageProcessorSpec) -> dict[str, Any]:
    kind = _KINDS.get(spec.image_processor_type)
    derived = spec.crop_pct is not None
    keys: dict[str, Any] = {
        "do_resize": spec.resize is not None,
        "resample": int(RESAMPLE[spec.resample]),
        "do_center_crop": spec.crop_size is not None and not derived,
        "do_rescale": spec.rescale_factor is not None,
        "rescale_factor": spec.rescale_factor,
        "do_normalize": spec.image_mean is not None,
        "image_mean": spec.image_mean,
        "image_std": spec.image_std,
        "do_pad": spec.do_pad,
        "do_convert_rgb": spec.do_convert_rgb,
    }
    if spec.crop_size is not None and derived:
        keys |= {"size": {"shortest_edge": spec.crop_size[0]}, "crop_pct": spec.crop_pct}
    elif spec.resize is not None and spec.size is not None:
        rule = "shortest_edge" if kind == "convnext" else spec.resize
        keys["size"] = dict(zip(_EDGES_OF_RULE.get(rule, ()), spec.size))
    if spec.resize == "closest":
        keys |= {"size": dict(zip(("height", "width"), spec.size or ()))}
        keys |= {"keep_aspect_ratio": True, "ensure_multiple_of": spec.size_divisor}
    if spec.crop_size is not None and not derived:
        keys["crop_size"] = dict(zip(("height", "width"), spec.crop_size))
    if spec.pad_size is not None:
        keys["pad_size"] = dict(zip(("height", "width"), spec.pad_size))
    if kind in ("maskformer", "textnet"):
        keys["size_divisor"] = spec.size_divisor
    return {key: value for key, value in keys.items() if value is not None}


def _timm_keys(spec: ImageProcessorSpec) -> dict[str, Any]:
    data = {
        "input_size": (3, *(spec.crop_size or ())),
        "interpolation": spec.resample,
        "mean": spec.image_mean,
        "std": spec.image_std,
        "crop_pct": spec.crop_pct,
        "crop_mode": {"exact": "squash", "contain": "border"}.get(spec.resize or "", "center"),
    }
    return {"pretrained_cfg": data}
