//! Owns: noticing at once that a file was taken out of a directory.
//! Does not own: which one: whoever is told looks itself.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use tokio::sync::Notify;

/// Where the kernel tells nothing (its watches are used up): as often as it is looked.
const LOOK_EVERY: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub enum Taken {
    Told(Arc<Notify>),
    /// Has to be looked for.
    Untold,
}

impl Taken {
    /// Watches until the process ends.
    pub fn watch(directory: &Path) -> Taken {
        match Self::told(directory) {
            Ok(told) => Taken::Told(told),
            Err(error) => {
                tracing::info!("{} is looked at again and again: {error}", directory.display());
                Taken::Untold
            }
        }
    }

    fn told(directory: &Path) -> io::Result<Arc<Notify>> {
        let events = inotify::init(CreateFlags::CLOEXEC)?;
        inotify::add_watch(&events, directory, WatchFlags::MOVED_FROM | WatchFlags::DELETE)?;
        let told = Arc::new(Notify::new());
        let teller = told.clone();
        let wait = move || {
            let mut buffer = [0; 4096];
            loop {
                match rustix::io::read(&events, &mut buffer) {
                    Ok(count) if count > 0 => teller.notify_one(),
                    Err(Errno::INTR) => {}
                    _ => return,
                }
            }
        };
        std::thread::Builder::new().name("taken".to_string()).spawn(wait)?;
        Ok(told)
    }

    /// Waits until something may have been taken.
    pub async fn next(&mut self) {
        match self {
            Taken::Told(told) => told.notified().await,
            Taken::Untold => tokio::time::sleep(LOOK_EVERY).await,
        }
    }
}
