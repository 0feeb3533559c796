//! The loop's settings, resolved.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How the learning rate goes after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    Constant,
    Linear,
    Cosine,
}

/// Arithmetic of the frozen products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    Auto,
    F32,
    Bf16,
}

/// How moments of gradients become steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Optimizer {
    #[default]
    Adamw,
    /// The moments of tensors of 4096 numbers and more in 8 bits: a quarter of the memory.
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
}

/// Stop when the validation loss has not improved for `patience` evaluations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EarlyStopping {
    pub patience: u64,
}

/// `API.md` gives the defaults; a stored value has every `auto` filled in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Training {
    /// Passes over the data, 1 to 1000.
    pub n_epochs: u64,
    /// Examples in one micro-batch.
    pub batch_size: u64,
    pub learning_rate: f64,
    pub lr_scheduler: Schedule,
    /// Share of the steps over which the learning rate rises from 0.
    pub warmup_ratio: f64,
    /// Ends the run early; null trains all epochs.
    pub max_steps: Option<u64>,
    /// Longer rows are left out and counted. Virtual tokens (prompts, prefixes) are not part of a row, but the base's
    /// context must hold both.
    pub max_seq_len: u64,
    /// Rows of a batch stand one behind another; the losses are the same with and without.
    pub packing: bool,
    /// Micro-batches in one optimiser step.
    pub grad_accumulation: u64,
    /// Global L2 norm above which gradients are scaled down; 0 switches it off.
    pub max_grad_norm: f64,
    /// 0 by default. Any other value shrinks every trained tensor, also those that begin at 1 (IA3) or are prompts.
    pub weight_decay: f64,
    /// Steps between evaluations; null evaluates at each epoch's end.
    pub eval_every: Option<u64>,
    /// Steps between checkpoints, besides those at each epoch's end.
    pub checkpoint_every: Option<u64>,
    pub early_stopping: Option<EarlyStopping>,
    /// Share of the training rows held out when no validation file is given.
    pub validation_split: f64,
    pub precision: Precision,
    #[serde(default)]
    #[schema(required = true)]
    pub optimizer: Optimizer,
    /// Keep only each layer's input for the backward pass and run the layer again there: the same gradients in much
    /// less memory, for about a third more time.
    #[serde(default)]
    #[schema(required = true)]
    pub gradient_checkpointing: bool,
}
