//! Owns: asking a cluster's servers for WAL, and for histories, that the archive has lost: over a connection of its own,
//! without a slot, and without a word on what is flushed.
//! Does not own: whether what comes is what was archived (`archiver::mend`), when it is asked for (`mod.rs`).

use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use crate::agent::world::World;
use crate::archiver::Writer;
use crate::archiver::copy::Trouble;
use crate::archiver::mend::Remade;
use crate::catalog::index::IndexEntry;
use crate::error::Failure;
use crate::postgres::Purpose;
use crate::replication::{Address, Connection, Login, ReplicationError, Start, StartFault, StatusUpdate, StreamEvent};
use crate::wal::{History, Lsn, SystemId, TimelineId};

/// A server that sends nothing for this long is given up for now.
const SILENCE: Duration = Duration::from_secs(60);
/// One that says much and does not get to the end of a segment too: a standby may not have all of it yet.
const SEGMENT_DEADLINE: Duration = Duration::from_secs(1800);

/// What came of asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked<T> {
    /// From this host.
    Got(T, String),
    /// No server of the cluster has it any more, and why.
    Gone(String),
    /// One did not answer, and why.
    Unknown(String),
}

impl<T> Asked<T> {
    fn by_nobody() -> Asked<T> {
        Asked::Unknown("there is no server to ask".to_string())
    }
}

/// The servers of a cluster.
#[derive(Debug)]
pub struct Servers<'a> {
    world: &'a World,
    system_id: SystemId,
    logins: Vec<Login>,
}

impl<'a> Servers<'a> {
    /// The one WAL is streamed from first: what it has is what is archived.
    pub fn new(world: &'a World, system_id: SystemId, first: &Address) -> Result<Servers<'a>, Failure> {
        let mut logins = world.logins.logins(Purpose::Physical)?;
        logins.sort_by_key(|login| login.address != *first);
        Ok(Servers { world, system_id, logins })
    }

    /// Has a segment made anew from what a server still holds of it. `true`: it is the content that was archived.
    pub async fn segment(&self, target: &Writer, entry: &IndexEntry) -> Result<Asked<()>, Trouble> {
        let mut asked = None;
        for login in &self.logins {
            let host = login.address.to_string();
            let answer = match self.connect(login).await {
                Ok(Some(connection)) => self.segment_from(connection, target, entry, &host).await?,
                Ok(None) => Asked::Gone(format!("{host} is another system")),
                Err(failure) => Asked::Unknown(format!("{host}: {failure}")),
            };
            match answer {
                got @ Asked::Got(..) => return Ok(got),
                // The word of the server that is archived decides; a standby that does not answer holds nothing up.
                answer => asked = asked.or(Some(answer)),
            }
        }
        Ok(asked.unwrap_or_else(Asked::by_nobody))
    }

    async fn segment_from(
        &self,
        mut connection: Connection,
        target: &Writer,
        entry: &IndexEntry,
        host: &str,
    ) -> Result<Asked<()>, Trouble> {
        let timeline = entry.segment.timeline;
        match connection.start_without_slot(entry.start_lsn, timeline).await {
            Ok(Start::Streaming) => {}
            Ok(Start::TimelineEnded(_)) => {
                return Ok(Asked::Gone(format!("timeline {timeline} of {host} ends before it")));
            }
            Err(error) => return Ok(refused(&error, host)),
        }
        let mut remade = Remade::begin(target, &self.world.workers, entry).await?;
        let receiving = receive(&mut connection, &mut remade, entry.start_lsn);
        let ended = timeout(SEGMENT_DEADLINE, receiving).await.unwrap_or(Err(Interrupted::Silent(SEGMENT_DEADLINE)));
        let answer = match ended {
            Ok(Received::All) => match remade.finish().await? {
                true => Asked::Got((), host.to_string()),
                false => Asked::Gone(format!("{host} has other bytes under this name than were archived")),
            },
            Ok(Received::Ended) => {
                remade.abandon().await;
                Asked::Gone(format!("timeline {timeline} of {host} ends inside it"))
            }
            Err(Interrupted::Server(error)) => {
                remade.abandon().await;
                refused(&error, host)
            }
            Err(Interrupted::Silent(after)) => {
                remade.abandon().await;
                Asked::Unknown(format!("{host} did not send it within {after:?}"))
            }
            Err(Interrupted::Target(trouble)) => {
                remade.abandon().await;
                return Err(trouble);
            }
        };
        if connection.finish_stream().await.is_ok() {
            connection.close().await;
        }
        Ok(answer)
    }

    /// A history file as a server has it.
    pub async fn history(&self, timeline: TimelineId) -> Asked<Bytes> {
        let mut asked = None;
        for login in &self.logins {
            let host = login.address.to_string();
            let answer = match self.connect(login).await {
                Ok(Some(mut connection)) => match connection.timeline_history(timeline).await {
                    Ok(Some((_, content))) if is_whole(timeline, &content) => Asked::Got(content, host),
                    Ok(_) => Asked::Gone(format!("{host} has no history of timeline {timeline}")),
                    Err(error) => Asked::Unknown(format!("{host}: {error}")),
                },
                Ok(None) => Asked::Gone(format!("{host} is another system")),
                Err(failure) => Asked::Unknown(format!("{host}: {failure}")),
            };
            match answer {
                got @ Asked::Got(..) => return got,
                // The word of the server that is archived decides; a standby that does not answer holds nothing up.
                answer => asked = asked.or(Some(answer)),
            }
        }
        asked.unwrap_or_else(Asked::by_nobody)
    }

    /// `None`: the server behind this address is not this cluster's.
    async fn connect(&self, login: &Login) -> Result<Option<Connection>, Failure> {
        let mut connection = Connection::open(self.world.dialer.as_ref(), login).await?;
        let identity = connection.identify_system().await?;
        Ok((identity.system_id == self.system_id).then_some(connection))
    }
}

fn is_whole(timeline: TimelineId, content: &[u8]) -> bool {
    content.ends_with(b"\n") && History::parse(timeline, content).is_ok_and(|history| !history.ancestors().is_empty())
}

fn refused<T>(error: &ReplicationError, host: &str) -> Asked<T> {
    match StartFault::of(error) {
        Some(StartFault::SegmentRemoved | StartFault::AheadOfServerOrNotInHistory) => {
            Asked::Gone(format!("{host} no longer has it: {error}"))
        }
        _ => Asked::Unknown(format!("{host}: {error}")),
    }
}

enum Received {
    All,
    /// The server's WAL of this timeline ends before the segment does.
    Ended,
}

enum Interrupted {
    Server(ReplicationError),
    Silent(Duration),
    Target(Trouble),
}

async fn receive(connection: &mut Connection, remade: &mut Remade<'_>, start: Lsn) -> Result<Received, Interrupted> {
    let mut reached = start;
    loop {
        let mut part: Option<Vec<u8>> = None;
        match connection.next_event().map_err(Interrupted::Server)? {
            Some(StreamEvent::Wal { start, bytes, .. }) if start == reached => {
                let wanted = bytes.len().min(usize::try_from(remade.missing()).unwrap_or(usize::MAX));
                reached = reached + wanted as u64;
                part = Some(bytes[..wanted].to_vec());
            }
            // Not in order: whatever it is, it is not the segment.
            Some(StreamEvent::Wal { .. } | StreamEvent::TimelineEnd) => return Ok(Received::Ended),
            Some(StreamEvent::Keepalive { reply_requested: true, .. }) => {
                // Nothing is said to be flushed: nobody's commits wait for this, and no slot moves.
                connection.queue_status(StatusUpdate::default());
                connection.flush_output().await.map_err(Interrupted::Server)?;
            }
            Some(StreamEvent::Keepalive { .. }) => {}
            None => match timeout(SILENCE, connection.fill()).await {
                Ok(filled) => filled.map_err(Interrupted::Server)?,
                Err(_) => return Err(Interrupted::Silent(SILENCE)),
            },
        }
        if let Some(part) = part {
            remade.feed(&part).await.map_err(Interrupted::Target)?;
            if remade.missing() == 0 {
                return Ok(Received::All);
            }
        }
    }
}
