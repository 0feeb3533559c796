//! PEFT's adapter directory: `adapter_config.json` and `adapter_model.safetensors`.

/// The two files' bytes. Their order and content are the adapter's identity.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdapterFiles {
    /// `adapter_config.json`
    pub config: Vec<u8>,
    /// `adapter_model.safetensors`
    pub weights: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
pub enum MethodError {
    /// The files do not fit the base or each other; names the key, tensor or shape.
    #[error("{0}")]
    Mismatch(String),
    /// PEFT has this, we do not: names the config's key.
    #[error("{0}")]
    Unsupported(String),
    #[error(transparent)]
    Format(#[from] crate::formats::FormatError),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}
