use std::io::{Read, Write};

use age::secrecy::ExposeSecret;
use proptest::prelude::*;

use super::*;

/// A key pair: as a recipient, and as the content of an identity file.
fn key() -> (Recipients, Identities, String) {
    let identity = x25519::Identity::generate();
    let file = format!(
        "# created: 2026-11-22T11:00:00Z\n# public key: {}\n{}\n",
        identity.to_public(),
        identity.to_string().expose_secret()
    );
    let recipients = Recipients::parse(&[identity.to_public().to_string()]).unwrap();
    (recipients, Identities::parse(file.as_bytes()).unwrap(), file)
}

fn encrypt(recipients: &Recipients, plain: &[u8], step: usize) -> Vec<u8> {
    let mut encryptor = Encryptor::new(recipients);
    let mut stored = Vec::new();
    for piece in plain.chunks(step) {
        stored.extend_from_slice(&encryptor.push(piece));
    }
    stored.extend_from_slice(&encryptor.finish());
    stored
}

fn decrypt(identities: &Identities, stored: &[u8], step: usize) -> Result<Vec<u8>, DecryptError> {
    let mut plain = Vec::new();
    let mut sink = |bytes: &[u8]| -> Result<(), DecryptError> {
        plain.extend_from_slice(bytes);
        Ok(())
    };
    let mut decryptor = Decryptor::new(identities);
    for piece in stored.chunks(step) {
        decryptor.feed(piece, &mut sink)?;
    }
    decryptor.finish(&mut sink)?;
    Ok(plain)
}

/// What age itself makes of a stream, the other way round.
fn age_decrypts(file: &str, stored: &[u8]) -> Vec<u8> {
    let identities = age::IdentityFile::from_buffer(file.as_bytes()).unwrap().into_identities().unwrap();
    let decryptor = age::Decryptor::new(stored).unwrap();
    let mut plain = Vec::new();
    let identities = identities.iter().map(|identity| identity.as_ref() as &dyn age::Identity);
    decryptor.decrypt(identities).unwrap().read_to_end(&mut plain).unwrap();
    plain
}

fn sample(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| ((i * i) >> 5) as u8).collect()
}

const CHUNK: usize = 64 << 10;

#[test]
fn what_is_encrypted_is_an_age_file_and_decrypts_in_pieces_of_any_size() {
    let (recipients, identities, file) = key();
    for bytes in [0, 1, 15, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 300_001] {
        let plain = sample(bytes);
        let stored = encrypt(&recipients, &plain, 70_000);
        assert!(age_decrypts(&file, &stored) == plain, "{bytes} bytes");
        for step in [7, 1000, CHUNK, CHUNK + 16, stored.len()] {
            assert!(decrypt(&identities, &stored, step).unwrap() == plain, "{bytes} bytes in steps of {step}");
        }
    }
}

#[test]
fn what_age_encrypts_is_read() {
    let (recipients, identities, _) = key();
    let plain = sample(2 * CHUNK);
    let mut stored = Vec::new();
    let all = recipients.0.iter().map(|recipient| recipient as &dyn age::Recipient);
    let mut writer = age::Encryptor::with_recipients(all).unwrap().wrap_output(&mut stored).unwrap();
    writer.write_all(&plain).unwrap();
    writer.finish().unwrap();
    assert!(decrypt(&identities, &stored, 999).unwrap() == plain);
}

#[test]
fn either_of_two_identities_reads_and_a_third_does_not() {
    let ((_, first, one), (_, second, two), (_, third, _)) = (key(), key(), key());
    let both = Recipients::parse(&[first.public_keys(), second.public_keys()].concat()).unwrap();
    let stored = encrypt(&both, b"content", 100);
    assert_eq!(decrypt(&first, &stored, 100).unwrap(), b"content");
    assert_eq!(decrypt(&second, &stored, 100).unwrap(), b"content");
    let refused = decrypt(&third, &stored, 100).unwrap_err();
    assert!(refused.is_about_keys(), "{refused:?}");
    let rotated = Identities::parse(format!("{one}\r\n\r\n{two}").as_bytes()).unwrap();
    assert_eq!(rotated.public_keys(), [first.public_keys(), second.public_keys()].concat());
    assert_eq!(decrypt(&rotated, &stored, 100).unwrap(), b"content");
}

/// Two streams of one content have nothing in common: equal content is never told by stored bytes.
#[test]
fn every_stream_is_different() {
    let (recipients, ..) = key();
    assert_ne!(encrypt(&recipients, b"content", 100), encrypt(&recipients, b"content", 100));
}

#[test]
fn every_truncation_is_found() {
    let (recipients, identities, _) = key();
    for bytes in [1000, 2 * CHUNK] {
        let stored = encrypt(&recipients, &sample(bytes), CHUNK);
        let mut lengths: Vec<usize> = (0..1200.min(stored.len())).collect();
        lengths.extend([
            stored.len() - 1,
            stored.len() - 16,
            stored.len() - 17,
            stored.len() - CHUNK.min(stored.len()),
        ]);
        lengths.extend((1..3).map(|chunks| stored.len().saturating_sub(chunks * (CHUNK + 16))));
        for length in lengths {
            let error = decrypt(&identities, &stored[..length], 5000).unwrap_err();
            assert!(!error.is_about_keys(), "{length} of {}: {error}", stored.len());
        }
    }
    // Cut between two chunks, nothing is wrong but the end.
    let stored = encrypt(&recipients, &sample(2 * CHUNK), CHUNK);
    let cut = stored.len() - CHUNK - 16;
    assert!(matches!(decrypt(&identities, &stored[..cut], CHUNK), Err(DecryptError::Truncated { .. })));
}

#[test]
fn every_changed_bit_and_every_added_byte_is_found() {
    let (recipients, identities, _) = key();
    let plain = sample(300);
    let stored = encrypt(&recipients, &plain, CHUNK);
    for bit in 0..stored.len() * 8 {
        let mut changed = stored.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(decrypt(&identities, &changed, 100).is_err(), "bit {bit}");
    }
    for bytes in [300, CHUNK] {
        let mut longer = encrypt(&recipients, &sample(bytes), CHUNK);
        longer.push(0);
        assert!(decrypt(&identities, &longer, 1 << 20).is_err());
        longer.extend_from_slice(&stored);
        assert!(decrypt(&identities, &longer, 1000).is_err());
    }
}

#[test]
fn foreign_and_endless_headers_are_refused_early() {
    let (_, identities, _) = key();
    let mut ignore = |_: &[u8]| -> Result<(), DecryptError> { Ok(()) };
    for foreign in [&b"\x28\xB5\x2F\xFD\0"[..], b"age-encryption.org/v2\n", b"-----BEGIN AGE ENCRYPTED FILE-----"] {
        let refused = Decryptor::new(&identities).feed(foreign, &mut ignore);
        assert!(matches!(refused, Err(DecryptError::NotAge)), "{refused:?}");
    }
    let mut decryptor = Decryptor::new(&identities);
    decryptor.feed(MAGIC_LINE, &mut ignore).unwrap();
    let refused = (0..1 << 20).find_map(|_| decryptor.feed(b"-> x\n\n", &mut ignore).err());
    let error = refused.expect("a header without an end is refused");
    assert!(matches!(error, DecryptError::HeaderTooLong), "{error}");
    assert!(decryptor.stored_bytes < HEADER_BYTES_MAX as u64 + 100);
    // With an end, but for a passphrase: asking for one is nobody's answer.
    let scrypt = b"-> scrypt bBjlhJVYZeE4aqUdmtRHfw 22\nZV/AhotwSGqaPCU43cepl4WYUouAa17a3xpu4G2yi5k\n--- fgMiVLJHMlg9fW7CVG/hPS5EAU4Zeg19LyCP7SoH5nA\n0123456789abcdef";
    let refused = decrypt(&identities, &[MAGIC_LINE, scrypt].concat(), 10).unwrap_err();
    assert!(matches!(refused, DecryptError::NoMatchingIdentity { .. }), "{refused}");
}

#[test]
fn as_many_recipients_as_are_allowed_fit_the_header() {
    let (recipients, identities, _) = key();
    let mut all = vec![key().0.0[0].to_string(); RECIPIENTS_MAX - 1];
    all.push(recipients.0[0].to_string());
    let stored = encrypt(&Recipients::parse(&all).unwrap(), b"content", 100);
    assert_eq!(decrypt(&identities, &stored, 100).unwrap(), b"content");
    all.push(all[0].clone());
    assert!(Recipients::parse(&all).unwrap_err().contains("at most 100"));
}

#[test]
fn secrets_are_never_shown() {
    let (_, identities, file) = key();
    let secret = file.lines().last().unwrap();
    assert!(secret.starts_with("AGE-SECRET-KEY-1"));
    let keys = Keys { recipients: None, identities: Some(identities) };
    let shown = format!("{keys:?}");
    assert!(shown.contains("age1") && !shown.contains("SECRET"), "{shown}");
    let mistyped = secret.replace("AGE-SECRET-KEY-1", "AGE-SECRET-KEY-1Q");
    let refused = Identities::parse(format!("# key\n{mistyped}").as_bytes()).unwrap_err();
    assert!(refused.contains("line 2") && !refused.contains(&mistyped[20..]), "{refused}");
}

#[test]
fn what_is_no_identity_file_is_refused() {
    let (recipients, ..) = key();
    let public = recipients.0[0].to_string();
    for (content, why) in [
        (&b""[..], "no identity"),
        (b"# only a comment\n\n", "no identity"),
        (b"\xFF\xFE", "not text"),
        (public.as_bytes(), "line 1"),
        (b"AGE-PLUGIN-YUBIKEY-1QQQ", "line 1"),
    ] {
        let refused = Identities::parse(content).unwrap_err();
        assert!(refused.contains(why), "{refused}");
    }
    assert!(Recipients::parse(&[]).is_err());
    assert!(Recipients::parse(&["ssh-ed25519 AAAA".to_string()]).is_err());
}

proptest! {
    #[test]
    fn hostile_bytes_do_not_panic(tail in prop::collection::vec(any::<u8>(), 0..400), step in 1usize..100, header in any::<bool>()) {
        let identities = Identities::parse(b"AGE-SECRET-KEY-1GQ9778VQXMMJVE8SK7J6VT8UJ4HDQAJUVSFCWCM02D8GEWQ72PVQ2Y5J33").unwrap();
        let stored = if header { [MAGIC_LINE, b"-> X25519 ", &tail].concat() } else { tail };
        prop_assert!(decrypt(&identities, &stored, step).is_err());
    }
}
