"""Settings of a Trainer that goes down the gradient in plain steps."""

from transformers import TrainingArguments

RATE = 0.1


def arguments(folder, **settings):
    """Plain gradient descent: no momentum, no clipping, a constant rate."""
    defaults = {"max_steps": 1, "learning_rate": RATE, "optim": "sgd", "lr_scheduler_type": "constant"}
    defaults |= {"per_device_train_batch_size": 4, "max_grad_norm": 0.0, "save_strategy": "no", "report_to": []}
    return TrainingArguments(str(folder), **{**defaults, "use_cpu": True, **settings})
