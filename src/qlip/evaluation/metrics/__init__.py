"""Metrics as functions of tensors.

`pixel` compares pairs of images (PSNR, SSIM, MS-SSIM, L1); `frechet`, `kid` and `precision_recall` compare sets of
features; `statistics` stores the features of a dataset (`Statistics`, gathered by `Gathered`); `ranking` turns scores
into accuracies.
"""
