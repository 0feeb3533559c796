//! Adapters that misbehave on purpose: what they do stands where others have their config.

use std::{
    collections::HashMap,
    sync::{Arc, Condvar, LazyLock, Mutex},
};

use attune::{
    domain::Site,
    inference::Lease,
    methods::{self, AdapterFiles, MethodError},
    model::{At, Base, Hook, Linear},
};
use candle_core::{Result, Tensor, bail};

/// Faults by their name, and every other adapter as it is.
pub fn load(files: &AdapterFiles, base: &Base) -> std::result::Result<Lease, MethodError> {
    let fault = match files.config.as_slice() {
        b"panics" => Fault::Panics,
        b"panics while decoding" => Fault::PanicsWhileDecoding,
        b"fails" => Fault::Fails,
        name if name.starts_with(b"holds") => Fault::Holds(Latch::named(std::str::from_utf8(name).unwrap())),
        _ => return methods::load(files, base),
    };
    Ok(Arc::new(fault))
}

enum Fault {
    Panics,
    PanicsWhileDecoding,
    Fails,
    /// Keeps the engine inside a step.
    Holds(Arc<Latch>),
}

impl Hook for Fault {
    fn adjust(&self, at: At, site: Site, _: &Tensor, y: Tensor, _: &Linear) -> Result<Tensor> {
        match self {
            Self::Panics => panic!("on purpose"),
            Self::PanicsWhileDecoding if at.lengths.contains(&1) && site == Site::Down => panic!("on purpose"),
            Self::Fails => bail!("on purpose"),
            Self::Holds(latch) => latch.pass(),
            Self::PanicsWhileDecoding => {}
        }
        Ok(y)
    }
}

/// Closed until it is opened.
#[derive(Default)]
pub struct Latch {
    /// Whether somebody stands before it, and whether it is open.
    state: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Latch {
    /// The same latch for the same name.
    pub fn named(name: &str) -> Arc<Self> {
        static ALL: LazyLock<Mutex<HashMap<String, Arc<Latch>>>> = LazyLock::new(Mutex::default);
        ALL.lock().unwrap().entry(name.to_owned()).or_default().clone()
    }

    fn pass(&self) {
        self.state.lock().unwrap().0 = true;
        self.changed.notify_all();
        drop(self.changed.wait_while(self.state.lock().unwrap(), |(_, open)| !*open).unwrap());
    }

    pub fn open(&self) {
        self.state.lock().unwrap().1 = true;
        self.changed.notify_all();
    }

    /// As at first.
    pub fn close(&self) {
        *self.state.lock().unwrap() = (false, false);
    }

    /// Waits until somebody stands before it.
    pub async fn reached(self: &Arc<Self>) {
        let latch = self.clone();
        let wait = move || drop(latch.changed.wait_while(latch.state.lock().unwrap(), |(there, _)| !*there).unwrap());
        tokio::task::spawn_blocking(wait).await.unwrap();
    }
}
