//! The reverse pass of fused ops: gradients go from op to op beside candle's graph, in its order.
//!
//! For each argument of each op candle's backward makes a tensor of zeros and adds to it, on one thread: over a quarter
//! of the time of a training step. So an op's arguments in candle's graph are not rows but tokens, scalars that stand
//! for them, and the rows' gradient waits in the node behind the token until all who use the rows have added theirs.
//! Rows that an op of candle's takes, or has made, have a node on the border that hands the gradient over.
//!
//! What an op saves for its backward is freed as that has run, which therefore runs once.

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, Weak},
};

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, TensorId};

use super::{tensor, with};
use crate::model::kernels;

type Backward = Box<dyn FnOnce(&Tensor, Vec<Tensor>, &[bool]) -> Result<Vec<Option<Tensor>>> + Send>;

/// An op that was run, or the border behind which is a graph of candle's.
struct Node {
    name: &'static str,
    /// The sum of what was given so far.
    gradient: Mutex<Option<Tensor>>,
    /// What the backward needs, and the backward. Borders have none.
    pending: Mutex<Option<(Vec<Tensor>, Backward)>>,
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
        let node = Node { name: "border", gradient: Mutex::default(), pending: Mutex::default(), inputs: Vec::new() };
        let node = Arc::new(node);
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
        let Some((saved, backward)) = lock(&self.pending).take() else {
            candle_core::bail!("{}: its backward ran before", self.name)
        };
        let asked: Vec<bool> = self.inputs.iter().map(Option::is_some).collect();
        let gradients = backward(&gradient, saved, &asked)?;
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
    backward: impl FnOnce(&Tensor, [Tensor; S], [bool; N]) -> Result<[Option<Tensor>; N]> + Send + 'static,
) -> Result<Tensor> {
    let inputs = inputs.into_iter().map(Flow::of).collect::<Result<Vec<_>>>()?;
    let mut tokens = inputs.iter().flatten().map(|flow| flow.token.clone());
    let Some(first) = tokens.next() else { return tensor(data, shape) };
    let all = tokens.try_fold(first, |all, token| all + token)?;
    let backward: Backward = Box::new(move |gradient, saved, asked| {
        let (Ok(saved), Ok(asked)) = (saved.try_into(), asked.try_into()) else {
            candle_core::bail!("{name}: not what it saved")
        };
        Ok(backward(gradient, saved, asked)?.into())
    });
    let saved = saved.into_iter().map(Tensor::detach).collect();
    let pending = Mutex::new(Some((saved, backward)));
    let node = Arc::new(Node { name, gradient: Mutex::default(), pending, inputs });
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
    if super::is_composed(y) {
        return (y * gradient)?.sum_all();
    }
    node("seed", (vec![0.0], ()), [y], [], |_, [], _| Ok([Some(gradient)]))
}

/// What the op behind a node of candle's graph has saved.
pub fn saved(node: &Tensor) -> Vec<Tensor> {
    let Some(flow) = found(node) else { return Vec::new() };
    lock(&flow.node.pending).as_ref().map_or_else(Vec::new, |(saved, _)| saved.clone())
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
