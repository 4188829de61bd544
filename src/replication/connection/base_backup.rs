//! Owns: a session while BASE_BACKUP runs on it.
//! Does not own: what the answer says (`replication::base_backup`), how long it may take (the caller).

use std::future::poll_fn;

use bytes::BytesMut;
use postgres_protocol::message::frontend;

use super::{Connection, State, protocol};
use crate::replication::base_backup::{BackupDecoder, BackupEvent, BackupFault};
use crate::replication::error::{Phase, ReplicationError, ServerError};

const PHASE: Phase = Phase::Command("BASE_BACKUP");

/// What a base backup says beside its data.
#[derive(Debug)]
pub enum BackupWord<'a> {
    Event(BackupEvent<'a>),
    /// A notice or warning: about damaged pages it comes within the copy.
    Notice(Box<ServerError>),
}

impl Connection {
    /// Sends the command. The connection takes others again when the backup is complete, or the server has refused it.
    pub async fn start_base_backup(&mut self, command: &str) -> Result<(), ReplicationError> {
        if self.state != State::Ready {
            return Err(ReplicationError::Misuse { phase: PHASE, state: self.state.name() });
        }
        let mut message = BytesMut::new();
        if frontend::query(command, &mut message).is_err() {
            return Err(ReplicationError::Misuse { phase: PHASE, state: "given a query with a zero byte" });
        }
        self.state = State::BaseBackup;
        self.send(&message, PHASE).await
    }

    /// The next thing that was received; `None` asks for [`fill_base_backup`](Self::fill_base_backup).
    pub fn next_of_base_backup<'a>(
        &'a mut self,
        decoder: &mut BackupDecoder,
    ) -> Result<Option<BackupWord<'a>>, ReplicationError> {
        if self.state != State::BaseBackup {
            return Err(ReplicationError::Misuse { phase: PHASE, state: self.state.name() });
        }
        let frame = match self.input.next_frame() {
            Ok(Some(frame)) => frame,
            Ok(None) => return Ok(None),
            Err(error) => return Err(self.broken(protocol(PHASE, error))),
        };
        let body = self.input.slice(frame.body);
        let aside = || Ok(Some(BackupWord::Event(BackupEvent::Aside)));
        match frame.tag {
            b'S' => match self.parameters.update(body) {
                Ok(()) => aside(),
                Err(error) => {
                    self.state = State::Broken;
                    Err(protocol(PHASE, error))
                }
            },
            b'A' => aside(),
            b'N' => Ok(Some(BackupWord::Notice(ServerError::decode(body, PHASE).into()))),
            b'E' => {
                let error = ServerError::decode(body, PHASE);
                self.state = if error.is_fatal() { State::Broken } else { State::StreamFailed };
                Err(ReplicationError::Server(error.into()))
            }
            tag => match decoder.handle(tag, body) {
                Ok(BackupEvent::Complete) => {
                    self.state = State::Ready;
                    Ok(Some(BackupWord::Event(BackupEvent::Complete)))
                }
                Ok(event) => Ok(Some(BackupWord::Event(event))),
                Err(fault) => {
                    self.state = State::Broken;
                    Err(match fault {
                        BackupFault::Protocol(error) => protocol(PHASE, error),
                        BackupFault::Answer(cause) => ReplicationError::Answer { phase: PHASE, cause },
                    })
                }
            },
        }
    }

    /// Receives more bytes. May be dropped at any time.
    pub async fn fill_base_backup(&mut self) -> Result<(), ReplicationError> {
        if self.state != State::BaseBackup {
            return Err(ReplicationError::Misuse { phase: PHASE, state: self.state.name() });
        }
        poll_fn(|context| self.poll_read(context, PHASE)).await
    }
}
