//! Between files, tensors and variables.

use candle_core::{Device, Tensor, Var};

use super::{MethodError, Named, file};

/// Names with their shapes.
pub type Shapes = [(String, Vec<usize>)];

/// Exactly these tensors of a file, in this order.
pub fn read(weights: &[u8], shapes: &Shapes) -> Result<Vec<Tensor>, MethodError> {
    tensors(file::tensors(weights, shapes)?, shapes)
}

pub fn tensors(values: Vec<Vec<f32>>, shapes: &Shapes) -> Result<Vec<Tensor>, MethodError> {
    let tensors = values.into_iter().zip(shapes);
    let tensors = tensors.map(|(values, (_, shape))| Tensor::from_vec(values, shape.as_slice(), &Device::Cpu));
    Ok(tensors.collect::<Result<_, _>>()?)
}

/// Variables that begin with these tensors.
pub fn of(tensors: &[Tensor], shapes: &Shapes) -> Result<Vec<(String, Var)>, MethodError> {
    let variables = shapes.iter().zip(tensors).map(|((name, _), tensor)| Ok((name.clone(), Var::from_tensor(tensor)?)));
    Ok(variables.collect::<Result<_, candle_core::Error>>()?)
}

/// The variables' numbers under their names.
pub fn named(variables: &[(String, Var)]) -> Result<Vec<Named>, MethodError> {
    let named = variables.iter().map(|(name, variable)| {
        Ok((name.clone(), variable.dims().to_vec(), variable.flatten_all()?.to_vec1::<f32>()?))
    });
    Ok(named.collect::<Result<_, candle_core::Error>>()?)
}
