//! Where activations and frozen weights are. The CPU has kernels of ours; other devices run candle's
//! (`ops::composed`), and a method's own tensors stay in the host's memory.

use candle_core::{Device, utils::cuda_is_available};

use super::{ModelError, config::unsupported};

/// `cpu`, `cuda` or `cuda:N`. Never another device than the one that was asked for.
pub fn open(name: &str) -> Result<Device, ModelError> {
    let number = match name.split_once(':') {
        None if name == "cpu" => return Ok(Device::Cpu),
        None if name == "cuda" => Some(0),
        Some(("cuda", number)) => number.parse().ok(),
        _ => None,
    };
    let Some(number) = number else { return unsupported(format!("{name} is neither cpu nor cuda[:N]")) };
    if !cuda_is_available() {
        return unsupported(format!("{name}: this program was built without CUDA (cargo build --features cuda)"));
    }
    Ok(Device::new_cuda(number)?)
}

#[cfg(test)]
mod tests {
    use super::open;

    #[test]
    fn names_of_devices() {
        assert!(open("cpu").unwrap().is_cpu());
        for name in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "cuda0"] {
            let error = open(name).unwrap_err().to_string();
            assert!(error.contains("neither cpu nor cuda[:N]"), "{name}: {error}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn without_cuda_nothing_else_is_taken() {
        assert!(open("cuda:0").unwrap_err().to_string().contains("built without CUDA"));
    }
}
