//! Owns: what a tar stream says, as its bytes arrive: members, their data, its end.
//! Does not own: which members are acceptable and where they go (`backup`, `restore`). Pure.
//!
//! POSIX ustar, as PostgreSQL writes it (proto-notes/04-base-backup.md, "the tar"): names of up to 99 bytes, octal
//! numbers, base-256 ones where a value does not fit. Extensions (GNU long names and sparse files, pax) a server never
//! writes are refused: read as ordinary members, they would be other files than they are meant to be.

use tar::Header;

/// Everything in a tar is a multiple of this.
pub const BLOCK_BYTES: usize = 512;

/// What ends a tar: two blocks of zeros.
pub const TRAILER: [u8; 2 * BLOCK_BYTES] = [0; 2 * BLOCK_BYTES];

/// `ustar`, a zero byte, version `00`.
const MAGIC: &[u8] = b"ustar\x0000";
const MAGIC_AT: usize = 257;
const CHECKSUM_AT: std::ops::Range<usize> = 148..156;

/// One entry of a tar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// As it stands there, but for the slash that ends the names of directories and links.
    pub path: Vec<u8>,
    pub kind: MemberKind,
    /// Of its data.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    /// Seconds since 1970.
    pub mtime: u64,
}

impl Member {
    /// For people: whatever bytes it holds, on one line.
    pub fn shown_path(&self) -> String {
        shown(&self.path)
    }

    /// What it takes in the tar: header, data, padding.
    pub fn tar_bytes(&self) -> u64 {
        BLOCK_BYTES as u64 + self.size + padding(self.size) as u64
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberKind {
    File,
    Directory,
    /// And where it points.
    Symlink(Vec<u8>),
    HardLink(Vec<u8>),
    /// A device, a pipe, something unheard of: by its type byte.
    Other(u8),
}

/// One thing the stream says. Put together, `block`, data and padding are the stream's own bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TarEvent<'a> {
    /// A member begins; `block` is its header as it was read.
    Member { member: &'a Member, block: &'a [u8; BLOCK_BYTES] },
    /// The next bytes of its data, never empty.
    Data(&'a [u8]),
    /// Its data is complete; every member has this, files without data too.
    MemberEnd,
    /// What fills its last block.
    Padding(&'a [u8]),
    /// The trailer was read. Only zeros may follow.
    End,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TarError {
    #[error("the tar header at byte {offset} {fault}")]
    Header { offset: u64, fault: &'static str },
    #[error("the tar header at byte {offset} has checksum {found:o}, its bytes sum up to {expected:o}")]
    Checksum { offset: u64, found: u64, expected: u64 },
    #[error("the tar member at byte {offset} is of type {kind:?}, which PostgreSQL never writes")]
    Extension { offset: u64, kind: char },
    #[error("tar member \"{path}\" is said to have {size} bytes, more than the {limit} it may have")]
    TooLarge { path: String, size: u64, limit: u64 },
    #[error("tar member \"{path}\" is a {kind} and yet said to have {size} bytes of data")]
    DataOfNoFile { path: String, kind: &'static str, size: u64 },
    #[error("bytes follow the end of the tar, at byte {offset}")]
    AfterEnd { offset: u64 },
    #[error("the tar ends at byte {offset}, inside {place}")]
    Truncated { offset: u64, place: String },
}

/// How a stream ended that ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TarEnd {
    Trailer,
    /// Between two members: a server before 15 sends no trailer.
    NoTrailer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// So many bytes of the next header are in `block`.
    Header(usize),
    Data(u64),
    Padding(usize),
    /// After one block of zeros: so many bytes of the second.
    HalfTrailer(usize),
    Ended,
}

/// Reads a tar that is fed in pieces of any size.
#[derive(Debug)]
pub struct TarParser {
    state: State,
    block: [u8; BLOCK_BYTES],
    member: Member,
    /// Bytes consumed.
    offset: u64,
    member_bytes_max: u64,
}

impl TarParser {
    /// A member said to be larger than `member_bytes_max` is refused before any of it is taken.
    pub fn new(member_bytes_max: u64) -> TarParser {
        let nothing = Member { path: Vec::new(), kind: MemberKind::File, size: 0, mode: 0, uid: 0, gid: 0, mtime: 0 };
        TarParser { state: State::Header(0), block: [0; BLOCK_BYTES], member: nothing, offset: 0, member_bytes_max }
    }

    /// The next thing `input` says; what was read of it is gone from its front. `None`: it is used up.
    ///
    /// After an error the parser is of no more use.
    pub fn next<'a, 'i: 'a>(&'a mut self, input: &mut &'i [u8]) -> Result<Option<TarEvent<'a>>, TarError> {
        loop {
            match self.state {
                State::Data(0) => {
                    self.state = State::Padding(padding(self.member.size));
                    return Ok(Some(TarEvent::MemberEnd));
                }
                State::Padding(0) => self.state = State::Header(0),
                _ if input.is_empty() => return Ok(None),
                State::Data(left) => {
                    let data = self.take(input, usize::try_from(left).unwrap_or(usize::MAX));
                    self.state = State::Data(left - data.len() as u64);
                    return Ok(Some(TarEvent::Data(data)));
                }
                State::Padding(left) => {
                    let padding = self.take(input, left);
                    self.state = State::Padding(left - padding.len());
                    return Ok(Some(TarEvent::Padding(padding)));
                }
                State::Header(filled) => {
                    let piece = self.take(input, BLOCK_BYTES - filled);
                    self.block[filled..filled + piece.len()].copy_from_slice(piece);
                    let filled = filled + piece.len();
                    self.state = State::Header(filled);
                    if filled == BLOCK_BYTES {
                        if self.block == [0; BLOCK_BYTES] {
                            self.state = State::HalfTrailer(0);
                            continue;
                        }
                        self.begin_member()?;
                        return Ok(Some(TarEvent::Member { member: &self.member, block: &self.block }));
                    }
                }
                State::HalfTrailer(filled) => {
                    let piece = self.take(input, BLOCK_BYTES - filled);
                    if piece.iter().any(|&byte| byte != 0) {
                        let offset = self.offset - (filled + piece.len()) as u64;
                        return Err(TarError::Header { offset, fault: "follows a block of zeros" });
                    }
                    self.state = State::HalfTrailer(filled + piece.len());
                    if filled + piece.len() == BLOCK_BYTES {
                        self.state = State::Ended;
                        return Ok(Some(TarEvent::End));
                    }
                }
                State::Ended => {
                    // Some writers fill a record of 10 KiB.
                    let rest = self.take(input, usize::MAX);
                    if let Some(at) = rest.iter().position(|&byte| byte != 0) {
                        return Err(TarError::AfterEnd { offset: self.offset - (rest.len() - at) as u64 });
                    }
                }
            }
        }
    }

    /// No more bytes follow.
    pub fn finish(&self) -> Result<TarEnd, TarError> {
        let place = match self.state {
            State::Ended => return Ok(TarEnd::Trailer),
            State::Header(0) | State::Padding(0) => return Ok(TarEnd::NoTrailer),
            State::Header(_) => "a header".to_string(),
            State::HalfTrailer(_) => "its trailer".to_string(),
            State::Data(_) | State::Padding(_) => format!("member \"{}\"", self.member.shown_path()),
        };
        Err(TarError::Truncated { offset: self.offset, place })
    }

    fn take<'a>(&mut self, input: &mut &'a [u8], most: usize) -> &'a [u8] {
        let (taken, rest) = input.split_at(input.len().min(most));
        *input = rest;
        self.offset += taken.len() as u64;
        taken
    }

    /// Reads the header in `block`.
    fn begin_member(&mut self) -> Result<(), TarError> {
        let offset = self.offset - BLOCK_BYTES as u64;
        let member = read_header(&self.block, offset)?;
        let fault = |kind| TarError::DataOfNoFile { path: member.shown_path(), kind, size: member.size };
        match member.kind {
            _ if member.size == 0 => {}
            MemberKind::Directory => return Err(fault("directory")),
            MemberKind::Symlink(_) => return Err(fault("symbolic link")),
            MemberKind::HardLink(_) => return Err(fault("hard link")),
            MemberKind::File | MemberKind::Other(_) if member.size > self.member_bytes_max => {
                let (path, limit) = (member.shown_path(), self.member_bytes_max);
                return Err(TarError::TooLarge { path, size: member.size, limit });
            }
            MemberKind::File | MemberKind::Other(_) => {}
        }
        self.state = State::Data(member.size);
        self.member = member;
        Ok(())
    }
}

fn padding(size: u64) -> usize {
    let over = (size % BLOCK_BYTES as u64) as usize;
    if over == 0 { 0 } else { BLOCK_BYTES - over }
}

fn read_header(block: &[u8; BLOCK_BYTES], offset: u64) -> Result<Member, TarError> {
    let fault = |fault| TarError::Header { offset, fault };
    let header = Header::from_byte_slice(block);
    let found = header.cksum().map(u64::from).map_err(|_| fault("has no checksum"))?;
    let expected = checksum(block);
    if found != expected {
        return Err(TarError::Checksum { offset, found, expected });
    }
    if &block[MAGIC_AT..MAGIC_AT + MAGIC.len()] != MAGIC {
        return Err(fault("is not of a POSIX (ustar) tar"));
    }
    let old = header.as_old();
    let number = |field: &[u8], text: std::io::Result<u64>, what| number(field, text).ok_or(fault(what));
    let size = number(&old.size, header.entry_size(), "has no size that can be read")?;
    let target = || header.link_name_bytes().map(|name| name.into_owned()).unwrap_or_default();
    let kind = match old.linkflag[0] {
        b'0' | 0 => MemberKind::File,
        b'5' => MemberKind::Directory,
        b'2' => MemberKind::Symlink(target()),
        b'1' => MemberKind::HardLink(target()),
        // pax headers; GNU's long names, multiple volumes, sparse files, labels.
        kind @ (b'x' | b'X' | b'g' | b'L' | b'K' | b'M' | b'S' | b'V' | b'D') => {
            return Err(TarError::Extension { offset, kind: kind as char });
        }
        other => MemberKind::Other(other),
    };
    let mut path = header.path_bytes().into_owned();
    // The server ends the names of directories, and of links to them, with a slash.
    if !matches!(kind, MemberKind::File) && path.len() > 1 && path.ends_with(b"/") {
        path.pop();
    }
    if path.is_empty() {
        return Err(fault("has no name"));
    }
    let mode = number(&old.mode, header.mode().map(u64::from), "has no mode that can be read")?;
    Ok(Member {
        path,
        kind,
        size,
        mode: (mode & 0o7777) as u32,
        uid: number(&old.uid, header.uid(), "has no owner that can be read")?,
        gid: number(&old.gid, header.gid(), "has no group that can be read")?,
        mtime: number(&old.mtime, header.mtime(), "has no time that can be read")?,
    })
}

/// The sum of a header's bytes, its own field counted as spaces.
fn checksum(block: &[u8; BLOCK_BYTES]) -> u64 {
    let sum = |bytes: &[u8]| bytes.iter().map(|&byte| u64::from(byte)).sum::<u64>();
    let spaces = CHECKSUM_AT.len() as u64 * u64::from(b' ');
    sum(&block[..CHECKSUM_AT.start]) + spaces + sum(&block[CHECKSUM_AT.end..])
}

/// What `text` gives for a field, if the field holds a number a `u64` can hold: of a base-256 one the library looks at
/// the last eight bytes only, whatever stands before them.
fn number(field: &[u8], text: std::io::Result<u64>) -> Option<u64> {
    let (&first, rest) = field.split_first()?;
    let beyond = rest.len().saturating_sub(8);
    let is_extended = first & 0x80 != 0;
    let fits = !is_extended || (first == 0x80 && rest[..beyond].iter().all(|&byte| byte == 0));
    text.ok().filter(|_| fits)
}

/// A path for people: one line, bounded, whatever bytes it holds.
pub fn shown(path: &[u8]) -> String {
    const BYTES_MAX: usize = 300;
    path[..path.len().min(BYTES_MAX)].escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn member(path: &[u8], kind: MemberKind, size: u64) -> Member {
        Member { path: path.to_vec(), kind, size, mode: 0o600, uid: 26, gid: 26, mtime: 1_700_000_000 }
    }

    /// A header as the server writes it (`tarCreateHeader`).
    fn header(member: &Member) -> [u8; BLOCK_BYTES] {
        let mut header = Header::new_ustar();
        let old = header.as_old_mut();
        old.name[..member.path.len()].copy_from_slice(&member.path);
        let (flag, target): (u8, &[u8]) = match &member.kind {
            MemberKind::File => (b'0', b""),
            MemberKind::Directory => (b'5', b""),
            MemberKind::Symlink(target) => (b'2', target),
            MemberKind::HardLink(target) => (b'1', target),
            MemberKind::Other(flag) => (*flag, b""),
        };
        old.linkflag = [flag];
        old.linkname[..target.len()].copy_from_slice(target);
        header.set_size(member.size);
        header.set_mode(member.mode);
        header.set_uid(member.uid);
        header.set_gid(member.gid);
        header.set_mtime(member.mtime);
        seal(*header.as_bytes())
    }

    fn seal(mut block: [u8; BLOCK_BYTES]) -> [u8; BLOCK_BYTES] {
        let sum = checksum(&block);
        block[CHECKSUM_AT].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }

    fn tar_of(members: &[(Member, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (member, data) in members {
            bytes.extend_from_slice(&header(member));
            bytes.extend_from_slice(data);
            bytes.resize(bytes.len() + padding(data.len() as u64), 0);
        }
        bytes
    }

    /// What a reading gives: the members with their data, the bytes put together again, how it ended.
    type Reading = (Vec<(Member, Vec<u8>)>, Vec<u8>, TarEnd);

    fn read(bytes: &[u8], step: usize) -> Result<Reading, TarError> {
        let mut parser = TarParser::new(1 << 20);
        let (mut members, mut raw, mut ends): (Vec<(Member, Vec<u8>)>, _, _) = (Vec::new(), Vec::new(), 0);
        for mut piece in bytes.chunks(step.max(1)) {
            while let Some(event) = parser.next(&mut piece)? {
                match event {
                    TarEvent::Member { member, block } => {
                        assert_eq!(members.len(), ends, "a member ends before the next begins");
                        members.push((member.clone(), Vec::new()));
                        raw.extend_from_slice(block);
                    }
                    TarEvent::Data(data) => {
                        assert!(!data.is_empty());
                        members.last_mut().unwrap().1.extend_from_slice(data);
                        raw.extend_from_slice(data);
                    }
                    TarEvent::MemberEnd => ends += 1,
                    TarEvent::Padding(padding) => raw.extend_from_slice(padding),
                    TarEvent::End => raw.extend_from_slice(&TRAILER),
                }
            }
            assert!(piece.is_empty());
        }
        Ok((members, raw, parser.finish()?))
    }

    fn example() -> Vec<(Member, Vec<u8>)> {
        let large = (0..5000u32).map(|i| i as u8).collect::<Vec<_>>();
        vec![
            (member(b"backup_label", MemberKind::File, 3), b"abc".to_vec()),
            (member(b"base", MemberKind::Directory, 0), Vec::new()),
            (member(b"pg_tblspc/16384", MemberKind::Symlink(b"/ts/one".to_vec()), 0), Vec::new()),
            (member(b"base/1/1259", MemberKind::File, 5000), large),
            (member(b"empty\xff\x01", MemberKind::File, 0), Vec::new()),
            (member(b"global/pg_control", MemberKind::File, 512), vec![7; 512]),
        ]
    }

    #[test]
    fn any_cut_gives_the_same_members_and_the_same_bytes() {
        let members = example();
        let plain = tar_of(&members);
        let ended = [&plain[..], &TRAILER].concat();
        for step in [1, 2, 511, 512, 513, 1000, 100_000] {
            assert_eq!(read(&plain, step).unwrap(), (members.clone(), plain.clone(), TarEnd::NoTrailer));
            assert_eq!(read(&ended, step).unwrap(), (members.clone(), ended.clone(), TarEnd::Trailer));
        }
        let filled = [&ended[..], &[0; 9 * BLOCK_BYTES]].concat();
        assert_eq!(read(&filled, 700).unwrap().2, TarEnd::Trailer);
    }

    #[test]
    fn the_slash_behind_a_directory_or_a_link_is_no_part_of_its_name() {
        for kind in [MemberKind::Directory, MemberKind::Symlink(b"/x".to_vec())] {
            let (members, ..) = read(&header(&member(b"pg_tblspc/1/", kind, 0)), 512).unwrap();
            assert_eq!(members[0].0.path, b"pg_tblspc/1");
        }
        let (members, ..) = read(&header(&member(b"a/", MemberKind::File, 0)), 512).unwrap();
        assert_eq!(members[0].0.path, b"a/");
    }

    /// As `print_tar_number` writes 8 GiB: more than eleven octal digits.
    #[test]
    fn large_numbers_are_read_in_base_256() {
        let mut block = header(&member(b"large", MemberKind::File, 0));
        block[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]);
        block[108..116].copy_from_slice(&[0x80, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFE]);
        let found = read_header(&seal(block), 0).unwrap();
        assert_eq!((found.size, found.uid), (8 << 30, 0xFFFF_FFFE));
        for (at, byte) in [(124, 0xFF), (124, 0x81), (125, 1), (127, 1)] {
            let mut hostile = block;
            hostile[at] = byte;
            let error = read_header(&seal(hostile), 512).unwrap_err();
            assert_eq!(error, TarError::Header { offset: 512, fault: "has no size that can be read" });
        }
        let mut parser = TarParser::new(8 << 30);
        assert!(parser.next(&mut &seal(block)[..]).is_ok());
        let error = TarParser::new((8 << 30) - 1).next(&mut &seal(block)[..]).unwrap_err();
        assert_eq!(error, TarError::TooLarge { path: "large".into(), size: 8 << 30, limit: (8 << 30) - 1 });
    }

    #[test]
    fn what_is_no_tar_of_the_servers_is_refused() {
        let good = header(&member(b"name", MemberKind::File, 0));
        let with = |at: usize, byte: u8| {
            let mut block = good;
            block[at] = byte;
            block
        };
        let refused = |block: [u8; BLOCK_BYTES]| read(&block, 100).unwrap_err().to_string();
        assert!(refused(with(0, b'N')).contains("sum up to"));
        assert!(refused(with(CHECKSUM_AT.start, b'x')).contains("has no checksum"));
        assert!(refused(seal(with(MAGIC_AT + 5, b' '))).contains("not of a POSIX"));
        assert!(refused(seal(with(0, 0))).contains("has no name"));
        assert!(refused(seal(with(124, b'9'))).contains("no size"));
        for flag in *b"xgLKSMVD" {
            assert!(refused(seal(with(156, flag))).contains("never writes"), "{flag}");
        }
        for kind in [MemberKind::Directory, MemberKind::HardLink(b"x".to_vec()), MemberKind::Symlink(b"x".to_vec())] {
            assert!(refused(header(&member(b"d", kind, 1))).contains("1 bytes of data"));
        }
        let device = read(&seal(with(156, b'3')), 512).unwrap();
        assert_eq!(device.0[0].0.kind, MemberKind::Other(b'3'));
    }

    #[test]
    fn an_end_inside_anything_is_found() {
        let bytes = [&tar_of(&example())[..], &TRAILER].concat();
        let boundaries: Vec<usize> = {
            let lengths = example().into_iter().map(|(member, _)| member.tar_bytes() as usize);
            std::iter::once(0)
                .chain(lengths.scan(0, |at, length| {
                    *at += length;
                    Some(*at)
                }))
                .collect()
        };
        for length in 0..bytes.len() {
            let ended = read(&bytes[..length], 333).map(|reading| reading.2);
            match boundaries.contains(&length) {
                true => assert_eq!(ended, Ok(TarEnd::NoTrailer), "at {length}"),
                false => assert!(matches!(ended, Err(TarError::Truncated { .. })), "at {length}: {ended:?}"),
            }
        }
        let after = [&bytes[..], &[0; 100], b"x"].concat();
        assert_eq!(read(&after, 50).unwrap_err(), TarError::AfterEnd { offset: bytes.len() as u64 + 100 });
        let half = [&tar_of(&example())[..], &[0; 512], &header(&example()[0].0)].concat();
        assert!(read(&half, 512).unwrap_err().to_string().contains("follows a block of zeros"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..1500),
            at in 0..BLOCK_BYTES,
            byte: u8,
            step in 1..700usize,
        ) {
            let _ = read(&bytes, step);
            // A header that passes its checksum, with anything in one place, followed by anything.
            let mut block = header(&member(b"name", MemberKind::File, 700));
            block[at] = byte;
            let hostile = [&seal(block)[..], &bytes].concat();
            if let Ok((members, raw, _)) = read(&hostile, step) {
                prop_assert!(!members.is_empty() && hostile.starts_with(&raw[..raw.len().min(hostile.len())]));
            }
        }

        #[test]
        fn what_is_written_is_read(
            files in prop::collection::vec(("[ -~&&[^/]]{1,99}", prop::collection::vec(any::<u8>(), 0..1300)), 0..6),
            step in 1..2000usize,
        ) {
            let members: Vec<_> = files
                .into_iter()
                .map(|(name, data)| (member(name.as_bytes(), MemberKind::File, data.len() as u64), data))
                .collect();
            let bytes = tar_of(&members);
            prop_assert_eq!(read(&bytes, step).unwrap(), (members, bytes, TarEnd::NoTrailer));
        }
    }
}
