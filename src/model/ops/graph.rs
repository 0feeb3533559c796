//! The reverse pass of fused ops: gradients go from op to op beside candle's graph, in its order.
//!
//! For each argument of each op candle's backward makes a tensor of zeros and adds to it, on one thread: over a quarter
//! of the time of a training step. So an op's arguments in candle's graph are not rows but tokens, scalars that stand
//! for them, and the rows' gradient waits in the node behind the token until all who use the rows have added theirs.
//! Rows that an op of candle's takes, or has made, have a node on the border that hands the gradient over.

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, Weak},
};

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, TensorId};

use super::{tensor, with};
use crate::model::kernels;

type Backward = Box<dyn Fn(&Tensor, &[Tensor], &[bool]) -> Result<Vec<Option<Tensor>>> + Send + Sync>;

/// An op that was run, or the border behind which is a graph of candle's.
#[derive(Default)]
struct Node {
    name: &'static str,
    /// The sum of what was given so far.
    gradient: Mutex<Option<Tensor>>,
    /// What the backward needs besides.
    saved: Vec<Tensor>,
    /// Borders have none.
    backward: Option<Backward>,
    /// None where no gradient is asked.
    inputs: Vec<Option<Arc<Flow>>>,
}

/// Rows in the graph.
struct Flow {
    token: Tensor,
    node: Arc<Node>,
    /// What it is found by.
    ids: OnceLock<[TensorId; 2]>,
}

/// By the rows and by the token, for as long as something in a graph refers to it.
static FLOWS: LazyLock<Mutex<HashMap<TensorId, Weak<Flow>>>> = LazyLock::new(Mutex::default);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

fn found(x: &Tensor) -> Option<Arc<Flow>> {
    lock(&FLOWS).get(&x.id()).and_then(Weak::upgrade)
}

impl Drop for Flow {
    fn drop(&mut self) {
        let mut flows = lock(&FLOWS);
        for id in self.ids.get().into_iter().flatten() {
            flows.remove(id);
        }
    }
}

impl Flow {
    fn new(token: Tensor, node: Arc<Node>) -> Arc<Self> {
        Arc::new(Self { token, node, ids: OnceLock::new() })
    }

    fn register(self: &Arc<Self>, rows: &Tensor) {
        let ids = *self.ids.get_or_init(|| [rows.id(), self.token.id()]);
        lock(&FLOWS).extend(ids.map(|id| (id, Arc::downgrade(self))));
    }

    /// None for rows that no gradient is asked for.
    fn of(x: &Tensor) -> Result<Option<Arc<Self>>> {
        if !x.track_op() {
            return Ok(None);
        }
        if let Some(flow) = found(x) {
            return Ok(Some(flow));
        }
        let node = Arc::new(Node::default());
        let flow = Self::new(x.apply_op1(Border(node.clone()))?, node);
        flow.register(x);
        Ok(Some(flow))
    }
}

impl Node {
    fn give(&self, gradient: Tensor) -> Result<()> {
        let mut sum = lock(&self.gradient);
        *sum = Some(match sum.take() {
            Some(sum) => tensor(with([&sum, &gradient], |[a, b]| Ok(kernels::sum(a, b)))?, sum.shape())?,
            None => gradient,
        });
        Ok(())
    }

    fn backward(&self) -> Result<()> {
        let Some(gradient) = lock(&self.gradient).take() else { return Ok(()) };
        let Some(backward) = &self.backward else { return Ok(()) };
        let asked: Vec<bool> = self.inputs.iter().map(Option::is_some).collect();
        let gradients = backward(&gradient, &self.saved, &asked)?;
        drop(gradient);
        for (input, gradient) in self.inputs.iter().zip(gradients) {
            if let (Some(input), Some(gradient)) = (input, gradient) {
                input.node.give(gradient)?;
            }
        }
        Ok(())
    }
}

/// The result of an op, with a graph where an input has one. `backward` gets the result's gradient, what was saved, and
/// which inputs a gradient is asked for; of those it gives it, contiguous and in their shape.
pub fn node<const N: usize, const S: usize>(
    name: &'static str,
    (data, shape): (Vec<f32>, impl Into<Shape>),
    inputs: [&Tensor; N],
    saved: [&Tensor; S],
    backward: impl Fn(&Tensor, [&Tensor; S], [bool; N]) -> Result<[Option<Tensor>; N]> + Send + Sync + 'static,
) -> Result<Tensor> {
    let inputs = inputs.into_iter().map(Flow::of).collect::<Result<Vec<_>>>()?;
    let mut tokens = inputs.iter().flatten().map(|flow| flow.token.clone());
    let Some(first) = tokens.next() else { return tensor(data, shape) };
    let all = tokens.try_fold(first, |all, token| all + token)?;
    let backward: Backward = Box::new(move |gradient, saved, asked| {
        let (Ok(saved), Ok(asked)) = (<&[Tensor; S]>::try_from(saved), asked.try_into()) else {
            candle_core::bail!("{name}: not what it saved")
        };
        Ok(backward(gradient, saved.each_ref(), asked)?.into())
    });
    let saved = saved.into_iter().map(Tensor::detach).collect();
    let node = Arc::new(Node { name, gradient: Mutex::default(), saved, backward: Some(backward), inputs });
    let flow = Flow::new(all.apply_op1(Step(node.clone()))?, node);
    let rows = Rows { flow: flow.clone(), data: Mutex::new(Some((data, shape.into()))) };
    let rows = flow.token.apply_op1(rows)?;
    flow.register(&rows);
    Ok(rows)
}

/// `a + b`, of one shape.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if super::is_composed(a) || a.shape() != b.shape() {
        return a + b;
    }
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    let sum = with([&a, &b], |[a, b]| Ok(kernels::sum(a, b)))?;
    node("add", (sum, a.shape()), [&a, &b], [], |g, [], _| Ok([Some(g.clone()), Some(g.clone())]))
}

/// A scalar whose gradient for `y` is the one given.
pub fn seed(y: &Tensor, gradient: Tensor) -> Result<Tensor> {
    let gradient = gradient.contiguous()?;
    if super::is_composed(y) {
        return (y * gradient)?.sum_all();
    }
    node("seed", (vec![0.0], ()), [y], [], move |_, [], _| Ok([Some(gradient.clone())]))
}

/// What the op behind a node of candle's graph has saved.
pub fn saved(node: &Tensor) -> Vec<Tensor> {
    found(node).map_or_else(Vec::new, |flow| flow.node.saved.clone())
}

fn scalar() -> Result<(CpuStorage, Shape)> {
    Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
}

/// From the inputs' tokens to the result's: here an op's backward has its turn.
struct Step(Arc<Node>);

impl CustomOp1 for Step {
    fn name(&self) -> &'static str {
        self.0.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        scalar()
    }

    fn bwd(&self, tokens: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        self.0.backward()?;
        Ok(Some(tokens.zeros_like()?))
    }
}

/// From a token to rows as others see them.
struct Rows {
    flow: Arc<Flow>,
    data: Mutex<Option<(Vec<f32>, Shape)>>,
}

impl CustomOp1 for Rows {
    fn name(&self) -> &'static str {
        self.flow.node.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((data, shape)) = lock(&self.data).take() else { candle_core::bail!("rows are made once") };
        Ok((CpuStorage::F32(data), shape))
    }

    fn bwd(&self, token: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        self.flow.node.give(gradient.contiguous()?)?;
        Ok(Some(token.zeros_like()?))
    }
}

/// From rows of candle's graph to their token.
struct Border(Arc<Node>);

impl CustomOp1 for Border {
    fn name(&self) -> &'static str {
        "border"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        scalar()
    }

    fn bwd(&self, rows: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        match lock(&self.0.gradient).take() {
            Some(gradient) => Ok(Some(gradient)),
            None => rows.zeros_like().map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::{super::trained_linear, *};

    fn numbers(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Rows that go through our ops and candle's, in both directions, and several times each.
    fn graph(x: &Tensor, w: &Tensor) -> Tensor {
        let h = trained_linear(x, w).unwrap();
        let y = add(&h, x).unwrap();
        let z = add(&(&y * &h).unwrap(), &trained_linear(&y.relu().unwrap(), w).unwrap()).unwrap();
        add(&z, &y.narrow(0, 1, 3).unwrap().pad_with_zeros(0, 0, 1).unwrap()).unwrap()
    }

    fn plain(x: &Tensor, w: &Tensor) -> Tensor {
        let h = x.matmul(&w.t().unwrap()).unwrap();
        let y = (&h + x).unwrap();
        let z = ((&y * &h).unwrap() + y.relu().unwrap().matmul(&w.t().unwrap()).unwrap()).unwrap();
        (z + y.narrow(0, 1, 3).unwrap().pad_with_zeros(0, 0, 1).unwrap()).unwrap()
    }

    #[test]
    fn gradients_cross_between_ours_and_candles() {
        let x = Var::from_vec((0..20).map(|i| (i as f32 * 0.7).sin()).collect(), (4, 5), &Device::Cpu).unwrap();
        let w = Var::from_vec((0..25).map(|i| (i as f32 * 1.3).cos()).collect(), (5, 5), &Device::Cpu).unwrap();
        let (ours, theirs) = (graph(&x, &w), plain(&x, &w));
        let loss = ours.sqr().unwrap().sum_all().unwrap();
        let theirs = theirs.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        // A second time too: nothing of the first is left.
        for found in [loss.backward().unwrap(), loss.backward().unwrap()] {
            for v in [&x, &w] {
                for (a, b) in numbers(found.get(v).unwrap()).iter().zip(numbers(theirs.get(v).unwrap())) {
                    assert!((a - b).abs() < 1e-3 * b.abs().max(1.0), "{a} {b}");
                }
            }
        }
    }

    #[test]
    fn what_no_gradient_is_asked_of_has_no_graph() {
        let x = Tensor::ones((4, 5), candle_core::DType::F32, &Device::Cpu).unwrap();
        let y = add(&x, &x).unwrap();
        assert!(!y.track_op() && found(&y).is_none());
        let w = Var::ones((5, 5), candle_core::DType::F32, &Device::Cpu).unwrap();
        let y = trained_linear(&x, &w).unwrap();
        assert_eq!(saved(&y).len(), 2);
        let found = y.sum_all().unwrap().backward().unwrap();
        assert_eq!((found.get(&x).is_none(), numbers(found.get(&w).unwrap())), (true, vec![4.0; 25]));
    }

    #[test]
    fn the_table_forgets_a_graph_that_is_gone() {
        let x = Var::ones((2, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
        let ids: Vec<TensorId> = {
            let y = add(&x, &x).unwrap();
            let z = add(&y, &x).unwrap();
            let flows = [x.as_tensor(), &y, &z].map(|rows| found(rows).unwrap());
            flows.iter().flat_map(|flow| *flow.ids.get().unwrap()).collect()
        };
        let flows = lock(&FLOWS);
        assert!(ids.len() == 6 && ids.iter().all(|id| !flows.contains_key(id)));
    }
}
