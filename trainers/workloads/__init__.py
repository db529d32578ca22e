"""What can be trained by name. Each module has `build`, whose keyword arguments are the workload's options."""

BUILT_IN = {
    "language-model": "trainers.workloads.language_model:build",
    "digits": "trainers.workloads.digits:build",
    "mlp": "trainers.workloads.mlp:build",
    "resnet": "trainers.workloads.resnet:build",
}
