"""Operations of the sparse layer, one file each; needs torch alone (Triton versions follow). Never imports `moe`."""
