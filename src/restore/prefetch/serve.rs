//! Owns: answering one request: from what is ready or on its way, else by looking into the archive as `wal-get` would.
//! Does not own: the words (`ask.rs`), what is ready (`helper.rs`), what the archive holds (`wal_get.rs`).

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

use super::ask::{ALIVE, Question, REQUEST_BYTES_MAX, Reply};
use super::place;
use super::source::Source;
use crate::restore::wal_get::{Outcome, WalGet};
use crate::wal::SegmentName;

/// For the request itself, and for its answer to be taken.
const WORDS_DEADLINE: Duration = Duration::from_secs(5);
const ALIVE_EVERY: Duration = Duration::from_secs(1);

/// What a request asks of the helper's loop, or tells it.
#[derive(Debug)]
pub enum Ask {
    Where {
        name: SegmentName,
        reply: oneshot::Sender<Found>,
    },
    Delivered(SegmentName),
    /// `done` when nothing of another line is held ready any more.
    HistoryDelivered {
        done: oneshot::Sender<()>,
    },
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    Ready,
    OnItsWay,
    Unknown,
}

/// A request that breaks off is nobody's loss: `wal-get` asks the archive itself.
pub async fn serve(stream: UnixStream, source: Arc<Source>, asks: mpsc::Sender<Ask>, changed: watch::Receiver<()>) {
    if let Err(error) = converse(stream, &source, &asks, changed).await {
        tracing::debug!("a request broke off: {error}");
    }
}

async fn converse(
    mut stream: UnixStream,
    source: &Source,
    asks: &mpsc::Sender<Ask>,
    changed: watch::Receiver<()>,
) -> io::Result<()> {
    let line = tokio::time::timeout(WORDS_DEADLINE, read_line(&mut stream)).await??;
    let name = match Question::parse(&line) {
        Some(Question::Get(name)) => name,
        Some(Question::End) => {
            let _ = asks.send(Ask::End).await;
            // Until the process has gone.
            return std::future::pending().await;
        }
        None => return Err(io::ErrorKind::InvalidData.into()),
    };
    let mut answering = std::pin::pin!(answer(&name, source, asks, changed));
    let mut alive = tokio::time::interval(ALIVE_EVERY);
    let reply = loop {
        tokio::select! {
            reply = &mut answering => break reply,
            _ = alive.tick() => stream.write_all(&[ALIVE]).await?,
        }
    };
    let told = tokio::time::timeout(WORDS_DEADLINE, stream.write_all(reply.line().as_bytes())).await;
    let told = told.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    if let (Err(_), Reply::File(file)) = (&told, &reply) {
        // Nobody will come for it.
        source.place.answer(file).map(|path| place::remove(&path)).transpose()?;
    }
    told
}

async fn answer(name: &str, source: &Source, asks: &mpsc::Sender<Ask>, mut changed: watch::Receiver<()>) -> Reply {
    let segment: Option<SegmentName> = name.parse().ok();
    if let Some(name) = segment {
        loop {
            changed.mark_unchanged();
            let (reply, found) = oneshot::channel();
            let asked = asks.send(Ask::Where { name, reply }).await;
            match (asked, found.await) {
                (Ok(()), Ok(Found::Ready)) => return Reply::Ready,
                (Ok(()), Ok(Found::OnItsWay)) => {}
                (Ok(()), Ok(Found::Unknown)) => break,
                _ => return Reply::Direct,
            }
            if changed.changed().await.is_err() {
                return Reply::Direct;
            }
        }
    }
    let file = source.place.new_answer();
    let Some(path) = source.place.answer(&file) else { return Reply::Direct };
    // Asked once: what does not answer now is asked again, and told about, by the process that has a user.
    let wal_get = WalGet { patience: Duration::ZERO, ..source.wal_get.clone() };
    match wal_get.get(name, &path).await {
        Ok(Outcome::Delivered) => {
            match segment {
                Some(name) => drop(asks.send(Ask::Delivered(name)).await),
                None => {
                    let (done, is_done) = oneshot::channel();
                    let told = asks.send(Ask::HistoryDelivered { done }).await;
                    if told.is_err() || is_done.await.is_err() {
                        return Reply::Direct;
                    }
                }
            }
            Reply::File(file)
        }
        Ok(Outcome::Absent(_)) => Reply::Absent,
        Err(error) => {
            tracing::warn!(%error, name, "left to wal-get itself");
            Reply::Direct
        }
    }
}

async fn read_line(stream: &mut UnixStream) -> io::Result<String> {
    let mut line = Vec::new();
    loop {
        match stream.read_u8().await? {
            b'\n' => return String::from_utf8(line).map_err(|_| io::ErrorKind::InvalidData.into()),
            _ if line.len() >= REQUEST_BYTES_MAX => return Err(io::ErrorKind::InvalidData.into()),
            byte => line.push(byte),
        }
    }
}
