package main

// Elements on TCP connections beside the call: "Direct connections" in docs/contract.md.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	pb "gradwire/v1"
)

// Directions of a socket.
const (
	up   = 1
	down = 2
)

// Kinds of frames. A job without checkpoints has no others.
const (
	elementsFrame = 1
	completeFrame = 2
)

const headerBytes = 32

// A connection is a pair of sockets, with frames in one direction each.
type connection struct{ up, down net.Conn }

func closeAll(connections []connection) {
	for _, each := range connections {
		each.up.Close()
		each.down.Close()
	}
}

// openConnections opens what the server expects at the first address that answers. If it
// cannot within a second, the job goes on in messages.
func openConnections(server string, access *pb.DirectAccess) ([]connection, error) {
	if access.Tls {
		return nil, errors.New("they have TLS, and the call has none")
	}
	called, _, err := net.SplitHostPort(server)
	if err != nil {
		return nil, err
	}
	deadline := time.Now().Add(time.Second)
	err = errors.New("the server names no address")
	for _, address := range access.Addresses {
		var host, port string
		if host, port, err = net.SplitHostPort(address); err != nil {
			continue
		}
		if host == "" {
			host = called
		}
		var opened []connection
		if opened, err = openAt(net.JoinHostPort(host, port), access, deadline); err == nil {
			return opened, nil
		}
	}
	return nil, err
}

func openAt(address string, access *pb.DirectAccess, deadline time.Time) (opened []connection, err error) {
	for number := 0; number < int(access.Connections); number++ {
		var pair connection
		if pair.up, err = attach(address, up, number, access.Token, deadline); err == nil {
			if pair.down, err = attach(address, down, number, access.Token, deadline); err != nil {
				pair.up.Close()
			}
		}
		if err != nil {
			closeAll(opened)
			return nil, err
		}
		opened = append(opened, pair)
	}
	return opened, nil
}

func attach(address string, direction byte, number int, token []byte, deadline time.Time) (net.Conn, error) {
	socket, err := (&net.Dialer{Deadline: deadline}).Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	socket.SetDeadline(deadline)
	message := append([]byte{'G', 'W', 'D', 'A', 1, direction, byte(number), byte(number >> 8)}, token...)
	answer := make([]byte, 8)
	if _, err = socket.Write(message); err == nil {
		_, err = io.ReadFull(socket, answer)
	}
	if err == nil && string(answer) != "GWDK\x01\x00\x00\x00" {
		err = fmt.Errorf("what listens at %s is not a gradwire server", address)
	}
	if err != nil {
		socket.Close()
		return nil, err
	}
	return socket, socket.SetDeadline(time.Time{})
}

// moveElements sends the operands and receives the results, each socket in a goroutine of
// its own. It calls end after the last frame was sent, and returns the first error.
func moveElements(connections []connection, blockRows int64, x, w, dy matrix, results map[pb.Matrix]matrix, maxFrameBytes int64, end func() error) error {
	count := len(connections)
	sent, received := make(chan error, count), make(chan error, count)
	for number, each := range connections {
		go func(number int, socket net.Conn) {
			sent <- sendShare(socket, number, count, int(blockRows), x, w, dy)
		}(number, each.up)
		go func(socket net.Conn) {
			received <- receiveShare(socket, results, int64(x.rows), maxFrameBytes)
		}(each.down)
	}
	for sending, receiving := count, count; sending+receiving > 0; {
		var err error
		select {
		case err = <-sent:
			if sending--; err == nil && sending == 0 {
				err = end()
			}
		case err = <-received:
			receiving--
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// sendShare sends the row blocks of a connection, every count-th one. Connection 0 begins
// with W.
func sendShare(socket net.Conn, number, count, blockRows int, x, w, dy matrix) error {
	if number == 0 {
		if err := sendFrames(socket, pb.Matrix_MATRIX_W, w, 0, w.rows); err != nil {
			return err
		}
	}
	for first := number * blockRows; first < x.rows; first += count * blockRows {
		last := first + blockRows
		if last > x.rows {
			last = x.rows
		}
		if err := sendFrames(socket, pb.Matrix_MATRIX_X, x, first, last); err != nil {
			return err
		}
		if err := sendFrames(socket, pb.Matrix_MATRIX_DY, dy, first, last); err != nil {
			return err
		}
	}
	return writeFrame(socket, completeFrame, 0, int64(x.rows), nil)
}

// sendFrames sends rows of one row block, or all of W.
func sendFrames(socket net.Conn, name pb.Matrix, of matrix, first, last int) error {
	data := of.bytes(first, last)
	for at := 0; at < len(data); at += 4 * chunkElements {
		end := at + 4*chunkElements
		if end > len(data) {
			end = len(data)
		}
		index := int64(first*of.columns + at/4)
		if err := writeFrame(socket, elementsFrame, byte(name), index, data[at:end]); err != nil {
			return err
		}
	}
	return nil
}

func writeFrame(socket net.Conn, kind, matrix byte, index int64, payload []byte) error {
	header := make([]byte, headerBytes)
	copy(header, "GWDF")
	header[4], header[5], header[6] = 1, kind, matrix
	binary.LittleEndian.PutUint64(header[16:], uint64(index))
	binary.LittleEndian.PutUint64(header[24:], uint64(len(payload)))
	parts := net.Buffers{header, payload}
	_, err := parts.WriteTo(socket)
	return err
}

// receiveShare stores the results on a connection, up to its last frame.
func receiveShare(socket net.Conn, results map[pb.Matrix]matrix, m, maxFrameBytes int64) error {
	header := make([]byte, headerBytes)
	for {
		if _, err := io.ReadFull(socket, header); err != nil {
			return err
		}
		index := int64(binary.LittleEndian.Uint64(header[16:]))
		length := int64(binary.LittleEndian.Uint64(header[24:]))
		if string(header[:5]) == "GWDF\x01" && header[5] == completeFrame && index == m {
			return nil
		}
		result, known := results[pb.Matrix(header[6])]
		elements := int64(len(result.elements))
		if string(header[:5]) != "GWDF\x01" || header[5] != elementsFrame || !known ||
			length < 0 || length > maxFrameBytes || length%4 != 0 ||
			index < 0 || index > elements-length/4 {
			return fmt.Errorf("the server sent no frame of this job: % x", header)
		}
		payload := make([]byte, length)
		if _, err := io.ReadFull(socket, payload); err != nil {
			return err
		}
		result.setBytes(index, payload)
	}
}
