//! Scalars that a hook takes from inside the layers, for the penalty that it makes of them behind the last one.

use std::sync::{Mutex, MutexGuard};

use candle_core::{Result, Tensor};

use super::tape::leaf;

/// In the order of the pass. Where layers run again for their gradients, a tape cuts these scalars at the layer's
/// border as it cuts the layer's output: the penalty is then made of leaves, and holds nothing of the layers.
#[derive(Default)]
pub struct Taken(Mutex<Vec<Tensor>>);

impl Taken {
    fn list(&self) -> MutexGuard<'_, Vec<Tensor>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn push(&self, scalar: Tensor) {
        self.list().push(scalar);
    }

    pub fn all(&self) -> Vec<Tensor> {
        self.list().clone()
    }

    /// Makes those that have a graph leaves, and gives these.
    pub(super) fn cut(&self) -> Result<Vec<Tensor>> {
        let mut list = self.list();
        let cut = list.iter_mut().filter(|scalar| has_graph(scalar)).map(|scalar| {
            *scalar = leaf(scalar)?;
            Ok(scalar.clone())
        });
        cut.collect()
    }

    /// Takes those that have a graph back: what a layer that ran again has put there.
    pub(super) fn take_back(&self) -> Vec<Tensor> {
        let mut list = self.list();
        let (back, kept) = list.drain(..).partition(has_graph);
        *list = kept;
        back
    }
}

fn has_graph(scalar: &Tensor) -> bool {
    scalar.track_op() && !scalar.is_variable()
}
