//! Owns: from the bytes of the tar streams to volumes: where each ends, what each file sums up to, what must not be there.
//! Does not own: compressing and storing volumes (`frames`, `store`), comparing with the manifest (`verdict`). Pure.

use crate::catalog::manifest::{ChecksumAlgorithm, FileHasher, FileTable};
use crate::codec::tar::{BLOCK_BYTES, Member, MemberKind, TRAILER, TarEnd, TarError, TarEvent, TarParser, shown};
use crate::repository::layout::TarStream;

use super::BackupError;

/// No file of a PostgreSQL cluster comes near it.
const FILE_BYTES_MAX: u64 = 1 << 50;
/// Kept of the few files whose content says something of the backup.
const KEPT_BYTES_MAX: u64 = 64 << 10;

pub const BACKUP_LABEL: &[u8] = b"backup_label";
pub const PG_CONTROL: &[u8] = b"global/pg_control";

/// What a volume is made of, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Portion<'a> {
    Bytes(&'a [u8]),
    /// The volume is complete, but for its trailer; another one follows in the same stream, or the stream ends.
    VolumeEnd(VolumeEnd),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VolumeEnd {
    /// Without the trailer.
    pub raw_bytes: u64,
    pub files: u64,
}

/// Reads one tar stream after another. Bytes go into volumes exactly as they came, but for the streams' own trailers.
#[derive(Debug)]
pub struct Intake {
    algorithm: ChecksumAlgorithm,
    /// With its trailer, unless it is of one file only.
    volume_bytes_max: u64,
    /// A server before 15 sends none.
    needs_trailer: bool,
    stream: TarStream,
    parser: TarParser,
    /// Of the member being read, if it is a file: its path below PGDATA and its bytes so far.
    file: Option<OpenFile>,
    volume: VolumeEnd,
    /// The header that begins the next volume, while the end of the last one is told.
    held_block: Option<[u8; BLOCK_BYTES]>,
    block: [u8; BLOCK_BYTES],
    files: FileTable,
    kept: KeptFiles,
}

#[derive(Debug)]
struct OpenFile {
    path: Vec<u8>,
    size: u64,
    hasher: FileHasher,
    content: Option<Vec<u8>>,
}

/// The files whose content says something of the backup.
#[derive(Debug, Default)]
pub struct KeptFiles {
    pub backup_label: Option<Vec<u8>>,
    pub pg_control: Option<Vec<u8>>,
}

impl Intake {
    pub fn new(algorithm: ChecksumAlgorithm, volume_bytes_max: u64, needs_trailer: bool) -> Intake {
        Intake {
            algorithm,
            volume_bytes_max,
            needs_trailer,
            stream: TarStream::Base,
            parser: TarParser::new(FILE_BYTES_MAX),
            file: None,
            volume: VolumeEnd::default(),
            held_block: None,
            block: [0; BLOCK_BYTES],
            files: FileTable::default(),
            kept: KeptFiles::default(),
        }
    }

    /// A tar begins; the one before was ended.
    pub fn begin_stream(&mut self, stream: TarStream) {
        self.stream = stream;
        self.parser = TarParser::new(FILE_BYTES_MAX);
        self.volume = VolumeEnd::default();
    }

    /// The next portion of `input`, whose front it takes; `None`: it is used up.
    pub fn next<'a, 'i: 'a>(&'a mut self, input: &mut &'i [u8]) -> Result<Option<Portion<'a>>, BackupError> {
        if let Some(block) = self.held_block.take() {
            self.block = block;
            self.volume.raw_bytes += BLOCK_BYTES as u64;
            return Ok(Some(Portion::Bytes(&self.block)));
        }
        let event = self.parser.next(input).map_err(|error| tar_error(self.stream, error))?;
        let bytes = match event {
            None => return Ok(None),
            Some(TarEvent::Member { member, block }) => {
                let volume_bytes = self.volume.raw_bytes;
                let is_first = volume_bytes == 0;
                let whole = volume_bytes.saturating_add(member.tar_bytes()).saturating_add(TRAILER.len() as u64);
                let file = open_file(self.stream, member, self.algorithm)?;
                self.file = file;
                if !is_first && whole > self.volume_bytes_max {
                    self.held_block = Some(*block);
                    return Ok(Some(Portion::VolumeEnd(std::mem::take(&mut self.volume))));
                }
                &block[..]
            }
            Some(TarEvent::Data(data)) => {
                if let Some(file) = &mut self.file {
                    file.hasher.update(data);
                    if let Some(content) = &mut file.content {
                        content.extend_from_slice(data);
                    }
                }
                data
            }
            Some(TarEvent::MemberEnd) => {
                if let Some(file) = self.file.take() {
                    self.volume.files += 1;
                    self.files.push(&file.path, file.size, &file.hasher.finish());
                    self.kept.keep(&file.path, file.content);
                }
                &[]
            }
            Some(TarEvent::Padding(padding)) => padding,
            // Each volume has one of its own.
            Some(TarEvent::End) => &[],
        };
        self.volume.raw_bytes += bytes.len() as u64;
        Ok(Some(Portion::Bytes(bytes)))
    }

    /// The tar is complete: the end of its last volume.
    pub fn end_stream(&mut self) -> Result<VolumeEnd, BackupError> {
        let end = self.parser.finish().map_err(|error| tar_error(self.stream, error))?;
        if self.needs_trailer && end == TarEnd::NoTrailer {
            return Err(BackupError::Mismatch(format!("the tar of {} ends without its trailer", self.stream)));
        }
        Ok(std::mem::take(&mut self.volume))
    }

    /// Every file that came, in order.
    pub fn finish(self) -> (FileTable, KeptFiles) {
        (self.files, self.kept)
    }
}

impl KeptFiles {
    fn keep(&mut self, path: &[u8], content: Option<Vec<u8>>) {
        match path {
            BACKUP_LABEL => self.backup_label = content,
            PG_CONTROL => self.pg_control = content,
            _ => {}
        }
    }
}

fn tar_error(stream: TarStream, error: TarError) -> BackupError {
    BackupError::Tar { stream: stream.to_string(), error }
}

/// What to do with a member; `None`: it is no file. What a server never sends is refused: nobody would restore it rightly.
fn open_file(
    stream: TarStream,
    member: &Member,
    algorithm: ChecksumAlgorithm,
) -> Result<Option<OpenFile>, BackupError> {
    let refused = |what: &str| {
        let path = member.shown_path();
        Err(BackupError::Mismatch(format!("the tar of {stream} holds {what} \"{path}\"")))
    };
    let Some(path) = plain_path(&member.path) else { return refused("a path outside the data directory,") };
    match &member.kind {
        MemberKind::File => {}
        MemberKind::Directory => return Ok(None),
        // As long as `tablespace_map` is asked for there are none; in their place they do no harm.
        MemberKind::Symlink(_) if stream == TarStream::Base && path.starts_with(b"pg_tblspc/") => return Ok(None),
        MemberKind::Symlink(target) => return refused(&format!("a link to \"{}\",", shown(target))),
        MemberKind::HardLink(target) => return refused(&format!("a hard link to \"{}\",", shown(target))),
        MemberKind::Other(kind) => return refused(&format!("something of type {:?},", *kind as char)),
    }
    let path = match stream {
        TarStream::Base => path.to_vec(),
        TarStream::Tablespace(oid) => [format!("pg_tblspc/{oid}/").as_bytes(), path].concat(),
    };
    let is_kept = matches!(&path[..], BACKUP_LABEL | PG_CONTROL) && member.size <= KEPT_BYTES_MAX;
    let content = is_kept.then(Vec::new);
    Ok(Some(OpenFile { path, size: member.size, hasher: FileHasher::new(algorithm), content }))
}

/// The path without a leading `./`; `None` where it is absolute or leads out.
fn plain_path(path: &[u8]) -> Option<&[u8]> {
    let path = path.strip_prefix(b"./").unwrap_or(path);
    let is_plain = |part: &[u8]| !matches!(part, b"" | b"." | b"..");
    path.split(|&byte| byte == b'/').all(is_plain).then_some(path)
}
