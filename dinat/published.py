"""Figures that the authors of the models published; none of them is measured here."""

# ImageNet-1k top-1 (%) by name and tag, as published with the models (arXiv:2204.07143, arXiv:2209.15001)
TOP1 = {
    "nat_mini.shi_in1k": 81.8,
    "nat_tiny.shi_in1k": 83.2,
    "nat_small.shi_in1k": 83.7,
    "nat_base.shi_in1k": 84.3,
    "dinat_mini.shi_in1k": 81.8,
    "dinat_tiny.shi_in1k": 82.7,
    "dinat_small.shi_in1k": 83.8,
    "dinat_base.shi_in1k": 84.4,
    "dinat_large.shi_in22k_ft_in1k": 86.6,
    "dinat_large_384.shi_in22k_ft_in1k": 87.4,
    "dinat_large_384_11x11.shi_in22k_ft_in1k": 87.5,
    "dinat_s_tiny.shi_in1k": 81.8,
    "dinat_s_small.shi_in1k": 83.5,
    "dinat_s_base.shi_in1k": 83.8,
    "dinat_s_large.shi_in22k_ft_in1k": 86.5,
    "dinat_s_large_384.shi_in22k_ft_in1k": 87.4,
    "nat_isotropic_small.shi_in1k": 80.0,
    "dinat_isotropic_small.shi_in1k": 80.8,
    "vitrpb_small.shi_in1k": 81.2,
    "nat_isotropic_base.shi_in1k": 81.6,
    "dinat_isotropic_base.shi_in1k": 82.1,
    "vitrpb_base.shi_in1k": 82.5,
}

# The first logits of COCO's val2017/000000039769.jpg, squashed to a square as the hub's preprocessor does
LOGITS = {
    "nat_mini.shi_in1k": (0.3805, -0.8676, -0.3912),
    "dinat_mini.shi_in1k": (-0.1545, -0.7667, 0.4642),
}
LOGITS_IMAGE = "http://images.cocodataset.org/val2017/000000039769.jpg"
