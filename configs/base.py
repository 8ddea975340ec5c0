"""Every field of a configuration, with its unit and default. Other configs are short diffs from this one."""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """Returns a ~150M-parameter MTP-D setting on the installed Python packages: a template, not a tuned recipe."""
    config = ml_collections.ConfigDict()

    config.data = ml_collections.ConfigDict()
    config.data.source = "python"  # python | text | jsonl | tfds
    config.data.packages = True  # python: also read every package installed beside the standard library
    config.data.paths = ()  # text, jsonl: files or globs
    config.data.separator = "<|endoftext|>"  # text: what stands between two documents of a file
    config.data.field = "text"  # jsonl, tfds: the field that holds the text
    config.data.name = ""  # tfds: the data set's name, with its config ("lm1b", "wikipedia/20230601.en")
    config.data.split = "train"  # tfds: the split to read
    config.data.directory = ""  # tfds: where the prepared data set lies; empty: tensorflow-datasets' default
    config.data.validation_fraction = 0.02  # share of documents held out, chosen by a hash of their text; 0: none
    config.data.shuffle_window = 1024  # packed sequences shuffled among each other, beyond the shuffle of documents

    config.tokenizer = ml_collections.ConfigDict()
    config.tokenizer.path = ""  # a tokenizer.json; empty: train a byte-level BPE on the training documents
    config.tokenizer.end_token = "<|endoftext|>"  # ends every document; must be in a given tokenizer.json
    config.tokenizer.train_bytes = 200_000_000  # bytes of training text that the BPE is trained on, at most

    config.model = ml_collections.ConfigDict()
    config.model.vocabulary_size = 32_768  # tokens: rows of the embedding, and the size of a BPE trained here
    config.model.width = 768
    config.model.layers = 12
    config.model.query_heads = 12
    config.model.kv_heads = 4
    config.model.head_size = 64
    config.model.mlp_width = 2048  # of the gated feed-forward layer
    config.model.rope_theta = 10_000.0
    config.model.norm_epsilon = 1e-6
    config.model.qk_norm = True  # RMSNorm on queries and keys, per attention head
    config.model.qkv_bias = False
    config.model.tied_unembedding = True  # the unembedding is the embedding
    config.model.scale_embedding = True  # multiply input embeddings by sqrt(width)
    config.model.remat = False  # recompute each block's activations in the backward pass
    config.model.dtype = "auto"  # of activations: auto (bfloat16 on accelerators, float32 on CPU) | float32 | bfloat16

    config.heads = ml_collections.ConfigDict()
    config.heads.num_heads = 4  # K: tokens drafted beyond the main head's; 0: next-token prediction only
    config.heads.kind = "cascade"  # cascade: K modules | recurrent: one module applied K times
    config.heads.pass_normed = True  # a head hands its normed state to the next one (False: the state before its norm)

    config.init = ml_collections.ConfigDict()
    config.init.workdir = ""  # loop: the trained run that is extended to heads.num_heads; all that it has stays frozen
    config.init.num_heads = config_dict.placeholder(int)  # loop: that run's heads; None: read from it, and recorded

    config.objective = ml_collections.ConfigDict()
    config.objective.mode = "joint"  # joint: backbone and heads together | loop: more heads for a trained run
    config.objective.alpha = config_dict.placeholder(
        object
    )  # CE weight, a number or one per trained head; None: 0.3 / trained heads
    config.objective.beta = config_dict.placeholder(
        object
    )  # KL weight, likewise; None: 1 for one head, else 0.5; 0: plain MTP
    config.objective.top_n = 10_000  # tokens of the teacher's distribution that the KL compares; >= vocabulary: all
    config.objective.temperature = 1.0  # divides both sides' logits in the KL
    config.objective.kl = "forward"  # forward: KL(main head || head) | reverse | js | tv: 1 - acceptance rate
    # | lk: -log of the acceptance rate | lk_hybrid: KL while little is accepted, then tv (arXiv 2602.23881)
    config.objective.detach_teacher = True  # no gradient from the KL into the main head's logits
    config.objective.detach_trunk = False  # no gradient from the heads' losses into backbone, embedding and unembedding
    config.objective.chunk_rows = config_dict.placeholder(int)  # rows of logits alive at once, per device; None: chosen

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 1e-3  # at the peak
    config.optimizer.schedule = "cosine"  # cosine | linear | wsd (constant, then a linear decay)
    config.optimizer.warmup_steps = 500  # of linear warm-up
    config.optimizer.decay_fraction = 0.2  # wsd: the share of all steps over which the rate decays
    config.optimizer.final_fraction = 0.1  # of the peak learning rate, where the decay ends, after the last step
    config.optimizer.weight_decay = 0.1  # of matrices; norms and biases are not decayed
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.epsilon = 1e-8
    config.optimizer.clip_norm = config_dict.FieldReference(1.0, field_type=object)  # of the global norm; None: none
    config.optimizer.ema_decay = config_dict.placeholder(float)  # of the averaged copy that is evaluated; None: no copy

    config.training = ml_collections.ConfigDict()
    config.training.steps = 20_000  # optimizer steps
    config.training.batch_size = 256  # sequences per optimizer step, over all devices
    config.training.sequence_length = 1024  # tokens
    config.training.micro_batches = 1  # parts that a step's batch is cut into, one after the other, to save memory
    config.training.seed = 0  # of the parameters and of the order of the data

    config.mesh = ml_collections.ConfigDict()  # devices per axis; -1 for one of data and fsdp: all that are left
    config.mesh.data = -1  # copies of the model
    config.mesh.fsdp = 1  # parameters and batch split
    config.mesh.tensor = 1  # attention heads, feed-forward and vocabulary split
    config.mesh.expert = 1

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep = 2  # newest checkpoints kept

    config.logging = ml_collections.ConfigDict()
    config.logging.every_steps = 20
    config.logging.tensorboard = True

    config.evaluation = ml_collections.ConfigDict()
    config.evaluation.every_steps = 1000  # and after the last step
    config.evaluation.documents = 64  # held-out documents scored, at most
    return config
