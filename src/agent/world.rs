//! Owns: what a cluster's agent needs of the world, so that the simulation can put another one in its place.
//! Does not own: any behaviour.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::archiver::Workers;
use crate::codec::encrypt::Keys;
use crate::error::Failure;
use crate::postgres::{Purpose, TargetSessionAttrs};
use crate::receiver::{Acknowledge, Clock};
use crate::replication::{Dial, Login, SlotName};
use crate::repository::Backend;
use crate::spool::SpoolOptions;

/// Where logins come from: passwords are looked up anew at every attempt.
pub trait LoginSource: Send + Sync + fmt::Debug {
    fn logins(&self, purpose: Purpose) -> Result<Vec<Login>, Failure>;
    fn wanted(&self) -> TargetSessionAttrs;
}

/// Everything outside: network, store, time, chance, threads.
#[derive(Clone, Debug)]
pub struct World {
    pub dialer: Arc<dyn Dial>,
    pub logins: Arc<dyn LoginSource>,
    pub backend: Arc<dyn Backend>,
    pub clock: Clock,
    pub random: Arc<Mutex<fastrand::Rng>>,
    pub workers: Workers,
}

impl World {
    pub fn random_u32(&self) -> u32 {
        self.random.lock().expect("no holder panics").u32(..)
    }
}

/// One cluster's settings, as far as streaming needs them.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    pub name: String,
    pub slot: SlotName,
    pub tail_interval: Duration,
    pub shutdown_grace: Duration,
    pub memory_bytes: u64,
    pub acknowledge: Acknowledge,
    /// This cluster's share; `None`: no spool.
    pub spool: Option<SpoolOptions>,
    /// Whether commits on the server wait for this archive; `None`: as the server says.
    pub synchronous: Option<bool>,
    /// What new objects are encrypted to. Identities are not needed to write.
    pub keys: Keys,
    /// Recorded in `writers/<epoch>.json`.
    pub host: Option<String>,
}
